"""A few rows for each task, from which something can be learnt in seconds."""

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 48
WORDS = ("cat", "dog", "river", "bird")


def chat(n: int) -> dict[str, Any]:
    answer = f"it is {WORDS[n % 4]}"
    return {"messages": [{"role": "user", "content": f"what is {n % 4}?"}, {"role": "assistant", "content": answer}]}


def completion(n: int) -> dict[str, Any]:
    return {"text": f"the {WORDS[n % 4]} sat on the {WORDS[(n + 1) % 4]} number {n}"}


def preference(n: int) -> dict[str, Any]:
    return {"prompt": f"say {n}", "chosen": f"the good {WORDS[n % 4]} {n}", "rejected": f"bad old stone {n}"}


def text_classification(n: int) -> dict[str, Any]:
    return {"text": f"row {n} {'good ' * 3 if n % 2 else 'rain ' * 3}", "label": "good" if n % 2 else "bad"}


def multi_label(n: int) -> dict[str, Any]:
    names = [word for bit, word in enumerate(WORDS[:3]) if n >> bit & 1]
    return {"text": f"{n} " + " ".join(names or ["nothing"]), "labels": names}


def regression(n: int) -> dict[str, Any]:
    return {"text": "very " * (n % 4) + f"good {n}", "number": float(n % 4)}


def token_classification(n: int) -> dict[str, Any]:
    words = [WORDS[(n + k) % 4] if k % 2 else "the" for k in range(3 + n % 3)]
    return {"tokens": [*words, str(n)], "labels": ["O" if word == "the" else word[:3] for word in words] + ["N"]}


def seq2seq(n: int) -> dict[str, Any]:
    return {"source": f"the {WORDS[n % 4]} {n}", "target": f"{WORDS[n % 4]} sat"}


def picture(n: int) -> dict[str, Any]:
    from PIL import Image

    pixels = np.random.default_rng(n).integers(0, 60, (16, 16, 3)).astype(np.uint8)
    pixels[..., n % 3] += 180
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"image": file.getvalue(), "label": ("red", "green", "blue")[n % 3]}


def sound(n: int) -> dict[str, Any]:
    import soundfile

    hertz = (300, 900, 2700)[n % 3]
    times = np.arange(2000 + 40 * (n % 7)) / 8000
    noise = np.random.default_rng(n).normal(0, 0.01, len(times))
    file = io.BytesIO()
    soundfile.write(file, 0.5 * np.sin(2 * math.pi * hertz * times + n) + noise, 8000, format="WAV")
    return {"audio": file.getvalue(), "label": ("low", "middle", "high")[n % 3]}


SAMPLES = {
    "chat": chat,
    "completion": completion,
    "preference": preference,
    "text-classification": text_classification,
    "token-classification": token_classification,
    "seq2seq": seq2seq,
    "image-classification": picture,
    "audio-classification": sound,
}


def write_sample(folder: Path, task: str, *, rows: int = ROWS, make: Any = None) -> Path:
    """A file of rows for a task; Parquet where they hold bytes."""
    made = [(make or SAMPLES[task])(n) for n in range(rows)]
    if any(isinstance(value, bytes) for value in made[0].values()):
        path = folder / f"{task}.parquet"
        pq.write_table(pa.Table.from_pylist(made), path)
        return path
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def as_base64(content: bytes) -> str:
    """As a picture or sound is sent."""
    return base64.b64encode(content).decode()
