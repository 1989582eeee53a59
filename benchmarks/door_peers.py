"""Other servers of models, each with the digits model as its documentation recommends it: one worker, batches of up to
32, and what a request to it looks like. How they are asked is in `benchmarks.door`.
"""

from __future__ import annotations

from importlib import util
from typing import Final, NamedTuple

__all__ = ["PEERS", "Peer", "installed"]

_SESSION: Final = """
import signal, sys
import numpy as np
import onnxruntime

def session():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession({model!r}, options)
"""

_MOSEC: Final = """
from mosec import Server, Worker

class Digits(Worker):
    def __init__(self):
        super().__init__()
        self.session = session()

    def deserialize(self, data):
        return np.frombuffer(data, np.float32)

    def serialize(self, data):
        return data.tobytes()

    def forward(self, data):
        return list(self.session.run(None, {{"pixels": np.stack(data)}})[0])

if __name__ == "__main__":
    server = Server()
    server.append_worker(Digits, max_batch_size=32, max_wait_time=1)
    server.run()
"""

_LITSERVE: Final = """
import litserve

class Digits(litserve.LitAPI):
    def setup(self, device):
        self.session = session()

    def decode_request(self, request):
        return np.array(request["x"], np.float32)

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, x):
        return self.session.run(None, {{"pixels": x}})[0]

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {{"y": output.tolist()}}

if __name__ == "__main__":
    server = litserve.LitServer(Digits(max_batch_size=32, batch_timeout=0.001), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="error")
"""

_BENTOML: Final = """
import bentoml

@bentoml.service(traffic={{"timeout": 60, "max_concurrency": 1024}})
class Digits:
    def __init__(self):
        self.session = session()

    @bentoml.api(batchable=True, batch_dim=0, max_batch_size=32, max_latency_ms=1000)
    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.session.run(None, {{"pixels": x.astype(np.float32)}})[0]

if __name__ == "__main__":
    from bentoml_cli.cli import cli

    cli(["serve", "{name}:Digits", "--working-dir", "{folder}", "--host", "127.0.0.1", "--port", sys.argv[2]])
"""

_RAY: Final = """
import ray
from ray import serve

@serve.deployment(max_ongoing_requests=1024)
class Digits:
    def __init__(self):
        self.session = session()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.001)
    async def score(self, rows):
        return list(self.session.run(None, {{"pixels": np.stack(rows)}})[0])

    async def __call__(self, request):
        asked = await request.json()
        return {{"y": (await self.score(np.array(asked["x"], np.float32))).tolist()}}

if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    serve.start(http_options={{"host": "127.0.0.1", "port": int(sys.argv[2])}})
    serve.run(Digits.bind(), route_prefix="/predict")
    signal.pause()
"""


class Peer(NamedTuple):
    """A server: the module that it is, its script, where it is asked, and whether with bytes or with JSON of one row
    (`rows`: of a list of rows)."""

    module: str
    script: str
    path: str
    raw: bool = False
    rows: bool = False

    def written(self, model: str, folder: str, name: str) -> str:
        """The script, which is told its port as `--port N`."""
        return (_SESSION + self.script).format(model=model, folder=folder, name=name)


PEERS: Final = {
    "mosec": Peer("mosec", _MOSEC, "/inference", raw=True),
    "LitServe": Peer("litserve", _LITSERVE, "/predict"),
    "BentoML": Peer("bentoml", _BENTOML, "/predict", rows=True),
    "Ray Serve": Peer("ray.serve", _RAY, "/predict"),
}


def installed() -> dict[str, Peer]:
    """Those that are here."""
    return {name: peer for name, peer in PEERS.items() if _is_there(peer.module)}


def _is_there(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
