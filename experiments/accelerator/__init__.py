"""Measurements on an accelerator; see ``__main__``."""

import time

# When this process began, before the libraries were loaded: it may be there for minutes only.
BEGUN = time.time()
