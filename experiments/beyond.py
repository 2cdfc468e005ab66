"""A pretrained model beyond its window: what does its rotation alone give, and what does temperature?

SmolLM2-135M, untrained beyond what it was, 8,192 tokens at theta 100,000. Written before anything was run.
"""

QUESTION = "Beyond its window of 8,192 tokens, what does changing a model's rotation alone give, and what temperature?"
PREDICTIONS = {
    1: "Beyond the window the model fails by its own theta: natural text at positions 8,192 to 12,288 costs 1 nat a "
    "token or more above what it costs at 4,096 to 8,192.",
    2: "Rotation alone gives most of that back: with YaRN's frequencies at factor 2 the same positions cost at most .3 "
    "nats more than 4,096 to 8,192 cost by the model's own theta.",
    3: "Theta 500,000 does so too, within .5 nats.",
    4: "Linear interpolation by 2 costs more inside the window than YaRN does: .2 nats or more at 0 to 2,048.",
    5: "In a window of 12,288 passkeys are found with YaRN's frequencies at least .3 oftener than by the model's own "
    "theta.",
    6: "It is not distance: by its own theta, passkeys at distances below 2,048 are found in windows of 4,096 at least "
    ".3 oftener than in one of 12,288.",
    7: "Temperature alone does not do it: by its own theta, log n beyond the window and YaRN's temperature each give "
    "back less than .1 of what YaRN's frequencies give, in nats of natural text at 8,192 to 12,288.",
    8: "With YaRN's frequencies, YaRN's temperature changes natural text at 8,192 to 12,288 by less than .1 nats.",
    9: "The head that looks one token back (layer 16, head 0) keeps that beyond the window by its own theta: its "
    "attention to the token before falls by less than .1. What fails is elsewhere.",
    10: "Inside the window, at 2,048 tokens, no rotation gains a passkey: none is found .1 oftener than by the own "
    "theta.",
}
"""Written before the first run. That theta 20,000 loses no passkey in a window of 1,024 had been seen, and no more."""
