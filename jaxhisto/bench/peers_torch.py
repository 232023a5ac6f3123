"""SimCLR in PyTorch as its users run it: torchvision's ResNet, channels-last, autocast.

Runs in the peer's own process (`peer_child`); tests call it directly. Images are (2N, 3, S, S)
float32, normalised, channels-last, the two views of an image next to each other, as in ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxhisto.bench.peer_job import PeerJob, Prepared
from jaxhisto.bench.worker_clock import cpu_seconds

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Loss = Callable[["Tensor"], "Tensor"]


def prepare(job: PeerJob) -> Prepared:
    """forward with the loss, what the gradient adds to it, optimizer, or the whole step."""
    if job.stage == "step" and job.augment:
        return whole_step(job)
    setup = Setup(job)
    if job.stage == "optimizer":
        setup.gradient()
    stages: dict[str, Callable[[], Any]] = {
        "forward": lambda: setup.calls(setup.forward),
        "backward": setup.backward,
        "optimizer": lambda: setup.calls(setup.update),
        "step": lambda: setup.calls(setup.step),
    }
    return Prepared(stages[job.stage], setup.settings())


def whole_step(job: PeerJob) -> Prepared:
    """From uint8 tiles to updated weights; the tiles lie on the device, as ours do."""
    from jaxhisto.bench.peers_augment import augmenter, made_tiles

    views = augmenter(job, device_of(job))  # first: on a CPU it forks
    setup = Setup(job)
    tiles = made_tiles(job).to(setup.device)

    def run() -> tuple[float, float]:
        return timed(lambda: setup.calls(lambda: setup.step(views(tiles))), views.workers)

    settings = setup.settings() | {"augmentation": views.settings}
    return Prepared(run, settings, views.close)


def timed(act: Callable[[], Any], workers: Iterable[int | None] = ()) -> tuple[float, float]:
    """Seconds by the clock, and those that cores worked here and in `workers`."""
    workers = tuple(workers)
    began, worked = time.perf_counter(), cpu_seconds(workers)
    act()
    return time.perf_counter() - began, cpu_seconds(workers) - worked


class Setup:
    """Network, loss and optimizer of a job, on its device.

    Attributes:
      model: torchvision's ResNet with SimCLR's head as its `fc`.
      network: what is called: the model, or the model through torch.compile.
      images: (2N, 3, S, S), given views of seed 0; None where a stage makes its own.
    """

    def __init__(self, job: PeerJob) -> None:
        import torch

        self.job = job
        self.device = device_of(job)
        configure(job)
        model = build_model(job).to(memory_format=torch.channels_last)
        self.model = model.to(self.device).train()
        # A bound of torch.compile: it compiles anew for every shape, and there is only one here.
        compiled = torch.compile(self.model, mode=job.mode) if job.mode else self.model
        self.network: Any = compiled
        self.loss, self.optimizer = loss_and_optimizer(job, self.model)
        made = job.stage == "pipeline" or (job.stage == "step" and job.augment)
        self.images = None if made else given_images(job, self.device)

    def forward(self) -> None:
        """Network and loss, without keeping what a gradient would need."""
        import torch

        with torch.no_grad():
            with self.autocast():
                z = self.network(self.images)
            self.loss(z.float())

    def calls(self, act: Callable[[], Any]) -> None:
        """The calls of a turn: the device is waited for once, as ours is."""
        for _ in range(self.job.calls):
            act()
        self.wait()

    def backward(self) -> tuple[float, float]:
        """What the gradient adds: forward, loss and gradient, less forward and loss alone."""
        ahead = timed(lambda: self.calls(self.forward))
        both = timed(lambda: self.calls(self.gradient))
        return max(both[0] - ahead[0], 0.0), max(both[1] - ahead[1], 0.0)

    def gradient(self, images: Tensor | None = None) -> Tensor:
        """Forward, loss and gradient; the loss, () float32."""
        self.model.zero_grad()
        with self.autocast():
            z = self.network(self.images if images is None else images)
        loss = self.loss(z.float())
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """The optimizer's step on the gradient that lies there."""
        self.optimizer.step()

    def step(self, images: Tensor | None = None) -> None:
        """All of it."""
        self.gradient(images)
        self.update()

    def autocast(self) -> Any:
        """bfloat16 where PyTorch's users have it."""
        import torch

        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.job.precision == "bf16"
        )

    def wait(self) -> None:
        """Until the device is done."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def mark(self) -> Callable[[], None]:
        """Waits, when called, until the device has done what it was given up to here."""
        import torch

        if self.device.type != "cuda":
            return lambda: None
        event = torch.cuda.Event()
        event.record()
        wait: Callable[[], None] = event.synchronize
        return wait

    def settings(self) -> dict[str, Any]:
        """What was set, for the record."""
        import torch

        on_gpu = self.device.type == "cuda"
        from_lightly = self.job.who.startswith("lightly")
        where = "lightly" if from_lightly else "plain"
        return {
            "memory_format": "channels_last",
            "autocast": self.job.precision == "bf16",
            "tf32": False,
            "torch_compile": bool(self.job.mode),
            "torch_compile_mode": self.job.mode,
            "loss": f"{where} NT-Xent",
            "lars": f"{where} LARS",
            "threads": self.job.threads,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        }


def device_of(job: PeerJob) -> torch.device:
    """The GPU where there is one and the job does not name the CPU."""
    import torch

    if job.platform == "gpu" and not torch.cuda.is_available():
        raise RuntimeError("this PyTorch sees no GPU; install one built for CUDA")
    gpu = torch.cuda.is_available() and job.platform != "cpu"
    return torch.device("cuda" if gpu else "cpu")


def configure(job: PeerJob) -> None:
    """Threads, no TF32 (ours has none in f32), cuDNN's autotuning, seed 0."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(job.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True


def build_model(job: PeerJob) -> torch.nn.Module:
    """torchvision's ResNet; `fc` is d -> d -> projection, under the names of our export."""
    import torch
    import torchvision

    made: Any = getattr(torchvision.models, job.model, None)
    # resnet10, one block a stage, is ours; torchvision builds it too.
    block = torchvision.models.resnet.BasicBlock
    model = made() if made else torchvision.models.ResNet(block, [1, 1, 1, 1])
    width = model.fc.in_features
    model.fc = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(width, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, job.projection),
    )
    return model


def given_images(job: PeerJob, device: torch.device) -> Tensor:
    """Views of seed 0 as the network takes them."""
    shape = (job.batch, 2, job.side, job.side, 3)
    return images_of(np.random.default_rng(0).random(shape, dtype=np.float32), device)


def images_of(views: np.ndarray, device: torch.device) -> Tensor:
    """(N, 2, S, S, 3) in 0..1 to (2N, 3, S, S), normalised, channels-last in memory."""
    import torch

    images = torch.from_numpy((views.reshape(-1, *views.shape[2:]) - 0.5) / 0.5)
    return images.permute(0, 3, 1, 2).to(device, memory_format=torch.channels_last)


def loss_and_optimizer(job: PeerJob, model: torch.nn.Module) -> tuple[Loss, Any]:
    """lightly's or the plain ones; biases and BatchNorm neither decay nor adapt in either."""
    if not job.who.startswith("lightly"):
        return lambda z: nt_xent(z, job.temperature), Lars(job, list(model.parameters()))
    from lightly.loss import NTXentLoss
    from lightly.utils.lars import LARS

    loss = NTXentLoss(temperature=job.temperature)
    weights = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = LARS(
        groups,
        lr=job.rate,
        momentum=job.momentum,
        weight_decay=job.weight_decay,
        trust_coefficient=job.trust,
    )
    return lambda z: loss(z[0::2], z[1::2]), optimizer


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """NT-Xent of (2N, D), views of an image next to each other, as published code has it."""
    import torch

    unit = torch.nn.functional.normalize(z, dim=1)
    logits = (unit @ unit.T / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(len(z), device=z.device) ^ 1
    return torch.nn.functional.cross_entropy(logits, partner)


class Lars:
    """LARS as google-research/simclr has it: the rate inside the momentum.

    All tensors are handled at once by PyTorch's multi-tensor operations, as torch.optim does.
    """

    def __init__(self, job: PeerJob, parameters: list[Any]) -> None:
        import torch

        self.job, self.parameters = job, parameters
        self.momenta = [torch.zeros_like(p) for p in parameters]

    def step(self) -> None:
        """Moves the parameters by their `grad`."""
        import torch

        job = self.job
        weights = [p for p in self.parameters if p.ndim > 1]
        with torch.no_grad():
            decayed = torch._foreach_add([p.grad for p in weights], weights, alpha=job.weight_decay)
            ratios = torch._foreach_div(torch._foreach_norm(weights), torch._foreach_norm(decayed))
            torch._foreach_mul_(ratios, job.trust)
            torch._foreach_mul_(decayed, ratios)
            scaled = iter(decayed)
            updates = [next(scaled) if p.ndim > 1 else p.grad for p in self.parameters]
            torch._foreach_mul_(self.momenta, job.momentum)
            torch._foreach_add_(self.momenta, updates, alpha=job.rate)
            torch._foreach_sub_(self.parameters, self.momenta)


def quickest(
    ways: dict[str, Callable[[], Any]], clock: Callable[[], float] = time.perf_counter
) -> tuple[str, dict[str, float]]:
    """The name of the fastest of some ways by the better of two runs, after one to warm up."""
    seconds = {}
    for name, run in ways.items():
        run()
        taken = []
        for _ in range(2):
            began = clock()
            run()
            taken.append(clock() - began)
        seconds[name] = round(min(taken), 5)
    return min(seconds, key=seconds.__getitem__), seconds
