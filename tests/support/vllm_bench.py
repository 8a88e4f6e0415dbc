"""``vllm bench serve`` without the console script, which the CPU wheel's name breaks.

python -m tests.support.vllm_bench --base-url http://127.0.0.1:8000 --save-result ...
"""

from __future__ import annotations

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args())
