"""Entry for launchers: `deepspeed train.py --conf A.yml`, `torchrun ... train.py --conf A.yml`,
`python train.py --conf A.yml`.
"""

import sys

from neox.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
