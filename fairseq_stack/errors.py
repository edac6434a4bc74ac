"""What users get wrong, said in one line."""


class InputError(ValueError):
    """Bad input: a file, a folder or a configuration field that cannot be used.

    The message is one line that names the file or field and its value and says what to do.
    """
