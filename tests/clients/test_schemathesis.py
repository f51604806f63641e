"""Requests that `schemathesis` makes up from /openapi.json: no 5xx, and no answer that the document does not describe.

One of its checks is left out, positive_data_acceptance: whether ids are in the vocabulary, a prompt fits into the
context, or two fields exclude each other depends on the model and on other fields, which a schema can't say.
"""

import os
import subprocess
import sys
from pathlib import Path

from served import OFFLINE

SECONDS = os.environ.get("SCHEMATHESIS_SECONDS", "60")


def test_every_answer_is_as_the_document_says(url: str, key: str, tmp_path: Path) -> None:
    schemathesis = Path(sys.executable).with_name("schemathesis")
    command = [str(schemathesis), "run", f"{url}/openapi.json", "--header", f"Authorization: Bearer {key}"]
    command += ["--exclude-checks", "positive_data_acceptance", "--seed", "1", "--no-color"]
    command += ["--max-time", SECONDS, "--request-timeout", "60", "--continue-on-failure", "--no-shrink"]
    environment = {**os.environ, **OFFLINE}
    run = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=environment
    )
    assert run.returncode == 0, run.stdout
