"""`aiperf profile`: streamed chats of fixed lengths at a fixed concurrency.

scripts/test_clients aiperf [--concurrency 4] [--requests 16] [--input-tokens 64] [--output-tokens 32]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from served import model_directory, run_offline, served

TOKENIZER = "baton/demo"


def hub_cache(home: Path) -> None:
    """aiperf's offline mode takes tokenizers from a hub cache alone: one with the demo model's files."""
    repository = home / "hub" / f"models--{TOKENIZER.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in Path(model_directory()).glob("*.json"):
        (snapshot / file.name).symlink_to(file)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, served() as url:
        hub_cache(Path(directory) / "hf")
        command = [str(Path(sys.executable).with_name("aiperf")), "profile", "--model", "demo", "--url", url]
        command += ["--endpoint-type", "chat", "--streaming", "--tokenizer", TOKENIZER, "--ui", "none"]
        command += ["--concurrency", str(args.concurrency), "--request-count", str(args.requests)]
        command += ["--isl", str(args.input_tokens), "--osl", str(args.output_tokens), "--random-seed", "1"]
        command += ["--extra-inputs", "ignore_eos:true", "--output-artifact-dir", f"{directory}/results"]
        run_offline(*command, HF_HOME=f"{directory}/hf", HOME=directory)
        result = json.loads(next(Path(directory, "results").rglob("profile_export_aiperf.json")).read_text())
    asked, made = args.requests * args.output_tokens, result["total_osl"]["avg"]
    if result["request_count"]["avg"] != args.requests or result.get("error_summary") or made != asked:
        sys.exit(f"error: {result['request_count']} requests, {made} of {asked} tokens: {result.get('error_summary')}")
    print(f"all {args.requests} requests answered, {made:.0f} tokens")


if __name__ == "__main__":
    main()
