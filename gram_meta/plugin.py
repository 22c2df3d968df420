"""One line brings this project's trainers, datasets and options into a CoOp-style train.py: `import gram_meta.plugin`.

It may stand before or after the imports of Dassl and of the checkout's own trainers and datasets. A name that both the
checkout and this project register (`CoOp`, `VPT`, `OxfordPets`) means the checkout's class; `clip`, `trainers` and
`datasets` are the checkout's folders. docs/guide/checkout.md describes the use, gram_meta/coop/HOOKS.md each change to
foreign code and how to switch it off.

    python -m gram_meta.plugin SCRIPT ARGUMENTS     any script of a checkout, with this line before its first
"""

import sys
from pathlib import Path

from gram_meta.coop.command_line import CommandLine
from gram_meta.coop.register import install

install(CommandLine.parse(sys.argv[1:]))

if __name__ == "__main__":
    from gram_meta.coop import checkout

    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit("usage: python -m gram_meta.plugin SCRIPT ARGUMENTS; expected a script that exists")
    sys.exit(checkout.run(Path(sys.argv[1]), sys.argv[2:]))
