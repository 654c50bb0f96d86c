"""Published measurements as cases: each row of `data/*.csv` in the planner's terms.

A row becomes a `Case`: the model, the device, how it was split, which software ran it, and which passes its number is
made of. Columns as in `data/measured_inference.csv`; anything with the same columns can be scored.
"""

import csv
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from headrace.errors import UsageError
from headrace.forecast.architecture import Architecture, of_params, published, table
from headrace.forecast.passes import DeviceSpec, Parallelism, PassShape, Rates, resident_pass

DATA = Path(__file__).parent / "data"
NOMINAL_BITS = {4.0: 4.5, 8.0: 8.5}  # bits per weight of llama.cpp's 4- and 8-bit formats


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement. `seconds` is the measured value of what `predict` returns."""

    id: str
    source: str
    category: str
    family: str
    model: Architecture
    device: DeviceSpec
    parallelism: Parallelism
    seconds: float
    batch: float
    prompt: float
    generated: float
    parts: tuple[float, float]  # numbers of prefill and decode passes in `seconds`
    bits: float
    kv_bits: float
    unpacking: str
    hardware: str

    def predict(self, rates: Rates) -> float:
        """Seconds by the planner."""
        prefills, decodes = self.parts
        total = 0.0
        if prefills:
            work = PassShape(
                rows=self.batch * max(1.0, self.prompt),
                sequences=self.batch,
                context=self.prompt / 2,
                bits=self.bits,
                kv_bits=self.kv_bits,
                unpacking=self.unpacking,
            )
            total += prefills * resident_pass(self.model, self.device, self.parallelism, work, rates).seconds
        if decodes:
            work = PassShape(
                rows=self.batch,
                sequences=self.batch,
                context=self.prompt + self.generated / 2,
                bits=self.bits,
                kv_bits=self.kv_bits,
                unpacking=self.unpacking,
            )
            total += decodes * resident_pass(self.model, self.device, self.parallelism, work, rates).seconds
        return total


def read_cases(path: Path) -> list[Case]:
    """The rows of a file with bandwidth, size and bits, and with everything in device memory."""
    with path.open(newline="") as file:
        return [case for row in csv.DictReader(file) if (case := _case(row)) is not None]


def number(text: str | None) -> float | None:
    return float(text) if text not in ("", None) else None


# (pattern of a device in the rows, name in the table of devices). The first match counts.
DEVICES = (
    (r"M(\d) Ultra \((\d+)", r"m\1-ultra-\2"),
    (r"M(\d) Ultra", r"m\1-ultra-*"),
    (r"M(\d) Max \((\d+)", r"m\1-max-\2"),
    (r"M(\d) Max", r"m\1-max-*"),
    (r"M(\d) Pro \((\d+)", r"m\1-pro-\2"),
    (r"M(\d) Pro", r"m\1-pro-*"),
    (r"Apple M(\d)\b", r"m\1"),
    (r"DGX Spark|GB10", "dgx-spark"),
    (r"Ryzen AI Max|Strix Halo", "strix-halo"),
    (r"TPU v4", "tpu-v4"),
    (r"A100.?(?:SXM )?-?40", "a100-40gb"),
    (r"A100", "a100-80gb"),
    (r"H100 PCIe", "h100-pcie"),
    (r"H100", "h100-sxm"),
    (r"H200", "h200"),
    (r"L40S", "l40s"),
    (r"RTX 6000 Ada", "rtx-6000-ada"),
    (r"RTX PRO 6000", "rtx-pro-6000"),
    (r"A6000", "a6000"),
    (r"\bA10G", "a10g"),
    (r"\bT4\b", "t4"),
    (r"V100", "v100-32gb"),
    (r"MI250X?", "mi250x"),
    (r"MI300X", "mi300x"),
    (r"7900 ?XTX", "rx-7900-xtx"),
    (r"(\d{4}) ?Ti", r"rtx-\1ti"),
    (r"\b([2345]0[6789]0)\b", r"rtx-\1"),
)


@cache
def device_of(hardware: str) -> dict[str, Any]:
    """The table's entry for a row's hardware, or nothing."""
    devices = table("devices")
    for pattern, name in DEVICES:
        match = re.search(pattern, hardware)
        if match is None:
            continue
        key = match.expand(name)
        if key.endswith("*"):
            key = next((k for k in reversed(list(devices)) if k.startswith(key[:-1])), key[:-2])
        for candidate in (
            key,
            key.replace("rtx-", "rtx-") + "-16gb",
            re.sub(r"-\d+$", "", key),
            key.replace("ti", "-ti"),
        ):
            if candidate in devices:
                return dict(devices[candidate])
    return {}


ALIASES = (
    (r"Llama-3\.[123]-(\d+)B", r"llama-3.1-\1b"),
    (r"DeepSeek-R1-Distill-Qwen|DeepSeek R1 Distill", "qwen2.5"),
    (r"Qwen2\.5-Coder", "Qwen2.5"),
    (r"Qwen3-Coder-30B", "Qwen3-30B"),
    (r"CodeLlama-34B", "llama-33b"),
    (r"LLaMA-30B", "llama-33b"),
    (r"QwQ-32B", "qwen2.5-32b"),
    (r"GPT-530B.*", "mt-nlg-530b"),
    (r"GPT-J.6B", "gpt-j-6b"),
    (r"GPT-NeoX.*", "gpt-neox-20b"),
    (r"Kimi-Linear.*", "kimi-linear-48b-a3b"),
    (r"Mistral-Small.*", "mistral-small-3"),
)


def model_of(row: dict[str, str]) -> Architecture | None:
    """The row's model: from the table by its name, with the row's own values on top."""
    name, params = row["model"], number(row["params"])
    for pattern, key in ALIASES:
        name = re.sub(pattern, key, name)
    try:
        model = published(name)
    except UsageError:
        if params is None:
            return None
        model = of_params(params)
    if params is not None and abs(params / model.params - 1) > 0.1:
        model = of_params(params)
    layers, hidden, kv_heads = (number(row[key]) for key in ("layers", "hidden", "kv_heads"))
    if layers and hidden and not model.is_moe and abs(layers * hidden / (model.layers * model.hidden) - 1) > 0.02:
        heads = max(1, round(hidden / 128))
        model = replace(
            of_params(params or model.params),
            layers=int(layers),
            hidden=int(hidden),
            heads=heads,
            kv_heads=min(heads, int(kv_heads or heads)),
            head_dim=128,
            name=row["model"],
        )
    elif layers:
        model = replace(model, layers=int(layers))
    active = number(row["active_params"])
    if active and model.is_moe:
        return replace(model, active_params=active)
    if active:  # MoE without further data
        return replace(model, params=params or model.params, active_params=active, experts=128, experts_per_token=8)
    return replace(model, params=params) if params and not model.is_moe else model


EAGER = r"\baccelerate|_accelerate|ds-inference|ds-zero|DeepSpeed|bloom|huggingface/transformers|eager"
STREAMED = (
    r"offload|DENSE|streamed|from SSD|experts on CPU|experts computed on CPU|n-cpu-moe|mmap|unified memory|host RAM|disk"
    r"|prima|SSD|-ot\b|larger than"
)


# LLM.int8() takes as long as 16 bits: its authors measured 253 ms for BLOOM-176B against 239 ms in bf16 (Dettmers et
# al. 2022, table 6).
INT8_HOOKS_BITS = 17.0


def family_of(row: dict[str, str]) -> str:
    """Family of software and hardware that shares its constants."""
    text = f"{row['id']} {row['source']} {row['notes']} {row['hardware']}"
    if "TPU" in row["hardware"]:
        return "tpu"
    if re.search(r"CPU only|\(CPU\)|; CPU;|Raspberry|Ampere(One| Altra)", text):
        return "cpu"
    if re.search(r"mlx", text, re.IGNORECASE):
        return "mlx"
    if re.search(r"Apple|Mac", row["hardware"]):
        return "metal"
    if re.search(r"Radeon|MI\d\d\d|Ryzen AI|Strix|Arc |7900|Vulkan|SYCL|ROCm", text):
        return "other-gpu"
    if re.search(EAGER, f"{row['id']} {row['source']}"):
        return "eager"
    if re.search(r"gpt-fast|TensorRT|FasterTransformer|kipply|vLLM|lmdeploy|TurboMind|SGLang|mlc|FlexGen", text):
        return "server"
    if re.search(r"XiongjieDai|2023|issue #4716", text):
        return "llama.cpp-cuda before graphs"  # a decoding step was made one CUDA graph in May 2024
    return "llama.cpp-cuda"


def _case(row: dict[str, str]) -> Case | None:
    metric, value = row["metric"], number(row["value"])
    streamed = bool(row["link"]) and not re.search(r"NVLink|NVSwitch|IB|Infinity", row["link"])
    if (
        metric == "memory_used"
        or not value
        or streamed
        or re.search("ktransformers|colibri|i10981|q3cn|deltafin", row["source"] + row["id"])
        or re.search(STREAMED, row["notes"] + row["hardware"])
    ):
        return None
    if (
        re.search(r"FlexGen|zero.inference|waste|specul|MTP active|draft", row["source"] + row["notes"], re.IGNORECASE)
        and "no MTP" not in row["notes"]
    ):
        return None
    model, device = model_of(row), device_of(row["hardware"])
    bandwidth = number(row["mem_bw_GBps"]) or device.get("memory_gb_per_s")
    peak = number(row["peak_TFLOPs"]) or device.get("fp16_tflops") or device.get("fp32_tflops")
    bits = number(row["weights_bits"]) or (16.0 if "PaLM" in row["model"] else None)
    if model is None or not bandwidth or bits is None:
        return None
    family = family_of(row)
    if "nominal bits" in row["notes"] or "#15013" in row["source"] or row["id"].startswith("strixhalo"):
        bits = NOMINAL_BITS.get(bits, bits)
    if row["id"].startswith("bloom_accelerate_int8"):
        bits = INT8_HOOKS_BITS
    if "big_model_inference" in row["source"]:
        return None  # rounded to 10 ms, and most of that is device_map's hooks
    memory = float(device.get("memory_gb", 0.0)) * (devices := _devices(row["hardware"]))
    if "ds-zero" in row["id"] or (memory and model.all_bytes(bits) / 1e9 > memory):
        return None  # weights that are gathered, or that cannot all be there
    batch = number(row["batch"]) or 1.0
    prompt, generated = number(row["prompt"]) or 0.0, number(row["gen"]) or 0.0
    seconds, parts = _seconds(metric, value, row, batch, prompt, generated, devices)
    if seconds is None:
        return None
    depth = int(m.group(1)) if (m := re.search(r"PP(\d+)", row["notes"])) else 1
    if devices > 1 and (
        re.search(r"^bloom_accelerate|layer split|layers in sequence", row["id"] + row["notes"])
        or family.startswith(("llama.cpp-cuda", "other-gpu", "cpu"))
    ):
        depth = depth if re.search(r"\bTP\d", row["notes"]) else devices
    width = devices // depth
    category = "decode" if parts[0] == 0 else "prefill" if parts[1] == 0 else "request"
    if width > 1:
        category = f"tensor parallel {category}"
    nodes = -(-width // 8) if family in ("server", "eager") else 1
    peer = number(row["link_GBps"]) or {"tpu": 270.0, "server": 230.0, "eager": 230.0}.get(family, 25.0)
    if width > 1 and (
        "PCIe" in row["notes"] + row["link"] or re.search(r"30[789]0|40[789]0|A10G|L40S|A6000|A40", row["hardware"])
    ):
        peer = 20.0
    fp8 = "fp8" in row["notes"].lower() and re.search("H100|L40S", row["hardware"])
    return Case(
        id=row["id"],
        source=row["source"].split("(secondary)")[0],
        category=category,
        family=family,
        model=model,
        device=DeviceSpec(
            bytes_per_s=float(bandwidth) * 1e9,
            flop_per_s=float(peak or 0.1 * float(bandwidth)) * 1e12,
            memory_bytes=80e9,
            peer_bytes_per_s=peer * 1e9,
            dies=2 if "Ultra" in row["hardware"] and "Core" not in row["hardware"] else 1,
        ),
        parallelism=Parallelism(width=width, depth=depth, nodes=nodes, node_bytes_per_s=100e9),
        seconds=seconds,
        batch=batch,
        prompt=prompt,
        generated=generated,
        parts=parts,
        bits=bits,
        kv_bits=8.0 if fp8 else 16.0,
        unpacking="memory" if row["id"].startswith("bloom_ds-inference_int8") else "fused",
        hardware=row["hardware"],
    )


def _devices(hardware: str) -> int:
    counted = re.match(r"(\d+)x ", hardware)
    return int(counted.group(1)) if counted else 1


def _seconds(
    metric: str, value: float, row: dict[str, str], batch: float, prompt: float, generated: float, devices: int
) -> tuple[float | None, tuple[float, float]]:
    """(seconds, (prefill passes, decode passes) in them)."""
    scale = 1e-3 if row["unit"].startswith("ms") else 1.0
    if metric in ("prefill_latency", "ttft"):
        return value * scale, (1, 0)
    if metric == "prefill_throughput":
        return (batch * prompt / value if prompt else None), (1, 0)
    if metric == "request_latency":
        return value * scale, (1, generated)
    if metric == "decode_latency_total":
        return value * scale, (0, generated)
    if metric == "decode_latency_per_token":
        return value * scale, (0, 1)
    if metric == "time_per_token_over_batch":
        return value * scale * batch, (0, 1)
    if metric in ("decode_throughput", "decoding_throughput"):
        return batch / value, (0, 1)
    if metric == "generation_throughput":
        return (batch * generated / value if generated else None), (1, generated)
    if metric == "output_throughput_per_gpu":
        return batch * generated / value / devices, (1, generated)
    return None, (0, 0)
