"""Query spans: which weights of a base its extension changes, and which of these changes cause the new retrieval.

A base at theta 300 (window 64) and what an arm of experiments.phase_scaling made of it (theta 20,000, window 1,024) are
compared span by span: W_Q by layer, head and rotary pair, beside W_K, W_V, W_O, the MLP, norms and embeddings. Then
spans are transplanted between the *start* of the extension (the base's weights at theta 20,000) and its *end*: into the
start, to see what suffices; from the start into the end, to see what is necessary. The *gain* is accuracy at the end
less accuracy at the start, the mean over 128, 256, 512 and 1,000 tokens.

Predictions, written before the first run of this script; while compare_spans was tried out, the weights of seed 0 of
`kd_adamw` had been seen by part and by pair (which favours 1), none of the rest:

 1. By AdamW, KD changes W_Q relatively more than W_V, W_O and the MLP, in the mean over layers, and about as much as
    W_K (ratio .8 to 1.25).
 2. By Muon, which gives every direction of every matrix the same step, all these ratios lie within .8 to 1.25.
 3. The pairs of W_Q that turned within the short window before and no longer do after (wavelength 64 or less before,
    more after) change more than the others, in both layers (ratio above 1, p < .05): they are what the swap of theta
    takes away.
 4. In layer 0 the turn of a pair's attention scores makes up for the swap: over pairs it goes with the pair's change of
    frequency (Spearman's correlation, heads' mean, above .5), as a head that looks one token back would need.
 5. W_Q changes at least twice as much as by as many steps of more short training (AdamW both).
 6. W_Q changes about as much by CE as by KD (ratio within 1/1.5 to 1.5, AdamW both), though CE brings no retrieval: how
    much a span changes does not say what the change is for.
 7. Into the start, W_Q alone brings less than .1 of the gain; W_Q, W_K, W_V and W_O together .5 or more.
 8. In the end, reverting W_Q leaves less than .1 of the gain, reverting the MLP more than .5.
 9. Of what the end's W_Q does in the end, a quarter of the query spans or less, in the order of their single effects,
    carries half, and half of them 90%; spans in random order need more than twice as many for half.
10. Reverting all fast pairs of W_Q (wavelength 64 or less) costs more than reverting all slow ones (above 1,024).
11. Gradient times change foresees which single spans matter (Spearman's correlation .5 or more), and better than the
    size of the change of weights or of query states.
12. With W_Q reverted in the end, retrieval in the short window is below .5 too: it is one circuit.

    python -m experiments.query_spans 0 runs/query_spans-0 --checkpoints runs
"""
