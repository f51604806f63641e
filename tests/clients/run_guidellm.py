"""`guidellm run`: chats with synthetic texts at a fixed concurrency.

scripts/test_clients guidellm [--concurrency 4] [--requests 16] [--input-tokens 64] [--output-tokens 32]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from served import model_directory, run_offline, served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, served() as url:
        report = Path(directory) / "report.json"
        command = [str(Path(sys.executable).with_name("guidellm")), "run"]
        command += ["--backend", f"kind=openai_http,target={url},model=demo"]
        command += ["--profile", f"kind=concurrent,streams={args.concurrency}"]
        command += ["--constraint", f"kind=max_requests,count={args.requests}"]
        lengths = f"prompt_tokens={args.input_tokens},output_tokens={args.output_tokens}"
        command += ["--data", f"kind=synthetic_text,{lengths}"]
        command += ["--tokenizer", f"kind=huggingface_auto,model={model_directory()}"]
        command += ["--output", "kind=console", "--output", f"kind=json,path={report}"]
        run_offline(*command, "--disable-console-interactive")
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    tokens = benchmark["metrics"]["output_token_count"]["successful"]["total_sum"]
    if totals["errored"] or not totals["successful"] or tokens != totals["successful"] * args.output_tokens:
        sys.exit(f"error: {totals}, {tokens} tokens of {args.output_tokens} for each request")
    print(f"{totals['successful']} requests answered, none failed, {tokens:.0f} tokens")


if __name__ == "__main__":
    main()
