"""A server process and its JSON protocol, spoken with nothing but the standard library."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

MODEL = Path(__file__).parents[1] / "models/digits/digits.onnx"


def post(url: str, body: dict[str, object]) -> dict[str, object]:
    request = urllib.request.Request(url, json.dumps(body).encode())
    with urllib.request.urlopen(request) as response:
        answer: dict[str, object] = json.load(response)
        return answer


def main() -> None:
    command = [sys.executable, "-m", "kapsl_scheduler", "serve", str(MODEL), "--port", "0", "--no-cron"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().split()[2] + "/v2/models/digits/infer"
        image = {"name": "pixels", "shape": [1, 64], "datatype": "FP32", "data": [0] * 64}
        # Priority 1 is the most urgent; the timeout is in microseconds.
        print(post(url, {"inputs": [image], "parameters": {"priority": 1, "timeout": 500_000}}))
        try:
            post(url, {"inputs": [image | {"shape": [1, 63], "data": [0] * 63}]})
        except urllib.error.HTTPError as error:
            print(error.code, error.read().decode())
        server.terminate()


if __name__ == "__main__":
    main()
