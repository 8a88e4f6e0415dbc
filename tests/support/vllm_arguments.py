"""Reads argument lists of `vllm serve` with vLLM's own parser: JSON lists of words in, JSON objects out.

A process of its own, since the imports warn and take seconds. Ends with status 2 and the parser's words at a wrong one.
"""

from __future__ import annotations

import json
import sys

from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = make_arg_parser(FlexibleArgumentParser())
    for line in sys.stdin:
        parsed = parser.parse_args(json.loads(line))
        validate_parsed_serve_args(parsed)
        print(json.dumps(vars(parsed), default=str))
