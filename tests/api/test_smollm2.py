"""The built-in trained model, through the command line in a process of its own."""

import json
import subprocess
import sys

from twinfer.commands.main import main


def test_the_trained_model_knows_its_capitals():
    """Token ids in, the known token ids out, on the readable path; nothing else on standard output."""
    words = "generate smollm2 --prompt-ids 504,3575,282,4649,314 --max-new-tokens 4 --temperature 0 --json"
    command = [sys.executable, "-m", "twinfer.commands.main", *words.split(), "--path", "reference"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    (output,) = json.loads(ran.stdout)["outputs"]
    assert output["ids"] == [7042, 30, 198, 198]
    assert output["text"] == " Paris.\n\n"
    assert output["stop"] == "length"


def test_inspect_counts_the_trained_model(capsys):
    """134.5 million parameters, 30 equal layers, a tied head."""
    assert main(["inspect", "smollm2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["total"]["parameters"] == 134_515_008
    assert report["components"]["head"]["parameters"] == 0
    assert [layer["indices"] for layer in report["layers"]] == [list(range(30))]
