"""`python -m nnunet_ssl` is the command `nnunet_ssl`."""

import sys

from nnunet_ssl.cli import main

if __name__ == "__main__":
    sys.exit(main())
