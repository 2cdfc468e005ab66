"""The command line, `rope-probe`: typed functions, one line on stderr and exit code 2 for bad input.

A module holds one command, with `EXAMPLES` of it; `options` are what they share, and `output` is how they print.
"""

import sys
import warnings

import typer
from typer.exceptions import TyperException

from rope_probe.cli import distill, drift, failures, heads, report, retrieval, spans, trace
from rope_probe.cli.options import Command, Group, as_epilog
from rope_probe.cli.output import print_overview, tell
from rope_probe.errors import InputError, Stopped, is_out_of_memory
from rope_probe.names import INTERRUPTED, STOPPED

QUESTIONS = {
    "What does a shift of position do in my model?": {"trace": trace},
    "Which query parameters changed between my checkpoints, and which matter?": {"spans": spans},
    "How do I distil a checkpoint for longer windows?": {"distill": distill},
    "Also: where heads look, what is found far away, drift, figures": {
        "heads": heads,
        "retrieval": retrieval,
        "drift": drift,
        "report": report,
    },
}
"""What rope-probe answers, and the commands that do."""

app = typer.Typer(
    cls=Group,
    invoke_without_command=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="Run rope-probe alone for a command to copy for each question, and rope-probe COMMAND --help for more.",
)
for _question, _modules in QUESTIONS.items():
    for _name, _module in _modules.items():
        _examples = as_epilog(_module.EXAMPLES)
        app.command(_name, cls=Command, rich_help_panel=_question, epilog=_examples)(_module.command)


@app.callback()
def _rope_probe(context: typer.Context) -> None:
    """Probe rotary position embeddings in Hugging Face language models."""
    if context.invoked_subcommand is None:
        examples = {question: [module.EXAMPLES[0] for module in of.values()] for question, of in QUESTIONS.items()}
        print_overview("rope-probe shows what rotary position embeddings do inside a language model.", examples)


def main() -> None:
    """Entry point: exit code 0, or 2 with one line `error: ...` for what the user can put right.

    3 means that a gate was missed: the run is complete, and says so. 4 means that a run was stopped and can be resumed.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # what matters is an error of ours
    try:
        code = app(standalone_mode=False)
    except (InputError, TyperException) as error:
        code = failures.refuse(error.format_message() if isinstance(error, TyperException) else str(error))
    except Stopped as stopped:
        tell(str(stopped))
        code = STOPPED
    except OSError as error:
        code = failures.refuse(f"{error.strerror or error}: {error.filename or 'while reading or writing'}")
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        code = failures.refuse(failures.of_memory(error))
    sys.exit(code)
