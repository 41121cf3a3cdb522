"""What a person at the command line did that can't work, said in one line that tells what to do."""


class UserError(ValueError):
    """Bad input from a user: the command line prints the message and exits with code 2."""
