"""The one exception that means "what you asked for cannot be done, and here is what would be right"."""


class InputError(ValueError):
    """Bad input from the user: a path, an option, a checkpoint or a tensor that does not fit.

    The message names the offending value and what would be right, on one line. The command line turns it into exit
    code 2; anything else that is raised is a fault of rope_probe and keeps its traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))
