"""Libraries that ask torch's allocator for something get the right answer in a session."""

from typing import Any

import pytest
import torch
from torch import nn

from pygpukit_torch import MB, context_session, create_context

pytestmark = pytest.mark.usefixtures("scheduler")

WIDTH = 256
ROWS = 512  # of a sample: one needs half a MiB, and its activations twice that


class Model(nn.Module):
    """Two layers; the loss is the mean of the squares of what comes out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))

    def forward(self, x: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        return {"loss": self.layers(x).square().mean()}


class Samples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((ROWS, WIDTH), i / 64)}


def test_accelerate_finds_a_batch_size_that_fits() -> None:
    from accelerate.utils import find_executable_batch_size

    context = create_context("a", 48 * MB)
    tried: list[int] = []

    @find_executable_batch_size(starting_batch_size=64)
    def train(batch_size: int) -> float:
        tried.append(batch_size)
        x = torch.linspace(-1, 1, batch_size * ROWS * WIDTH).view(batch_size, ROWS, WIDTH)
        loss = model(x)["loss"]
        loss.backward()
        model.zero_grad(set_to_none=True)
        return float(loss.detach())

    with context_session(context):
        model = Model()
        base = context.usage().used
        loss = train()
        assert context.usage().used == base
    assert len(tried) > 1
    with torch.no_grad():
        x = torch.linspace(-1, 1, tried[-1] * ROWS * WIDTH).view(tried[-1], ROWS, WIDTH)
        assert loss == pytest.approx(float(model(x)["loss"]))


def test_transformers_trainer_finds_a_batch_size_that_fits(tmp_path: Any) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    logging.disable_progress_bar()
    tried: list[int] = []

    class Note(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            tried.append(state.train_batch_size)

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=64,
        auto_find_batch_size=True,
        max_steps=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    with context_session(create_context("a", 48 * MB)):
        model = Model()
        Trainer(model=model, args=arguments, train_dataset=Samples(), callbacks=[Note()]).train()
    assert len(tried) > 1
    assert tried == sorted(tried, reverse=True)


def test_lightning_scales_the_batch_size_to_what_fits(tmp_path: Any) -> None:
    import lightning
    from lightning.pytorch.tuner import Tuner

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()
            self.batch_size = 2

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Samples(), batch_size=self.batch_size)

    trainer = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        max_epochs=1,
    )
    with context_session(create_context("a", 48 * MB)):
        found = Tuner(trainer).scale_batch_size(Module(), mode="power", max_trials=6)
    assert found is not None
    assert 2 <= found < 64
