"""`baton generate`: prompts in, completions out, no server."""

import json
import subprocess
import sys
from pathlib import Path


def generate(*words: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-P", "-m", "baton.frontend.cli.main", "generate", *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def test_prompts_from_lines_are_answered_in_order(tiny_model: Path) -> None:
    flags = ("--load-format", "dummy", "--num-blocks", "64", "--max-tokens", "5", "--ignore-eos", "--json")
    done = generate(str(tiny_model), *flags, stdin="first prompt\n\nsecond prompt\n")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["first prompt", "second prompt"]
    assert [len(answer["token_ids"]) for answer in answers] == [5, 5]


def test_bad_sampling_parameters_are_one_line_and_exit_2(tiny_model: Path) -> None:
    done = generate(str(tiny_model), "--load-format", "dummy", "--num-blocks", "64", "--prompt", "x", "--top-p", "7")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
