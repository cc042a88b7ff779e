"""The results of gpu.py as Markdown and JSON."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

_BANDWIDTH = "reading the weights once a step, at the speed of a copy"


@dataclass
class Report:
    """What was measured so far. Speeds are new tokens of all prompts per second."""

    trees: list[str]
    rounds: int
    shape: str
    disk_folder: str
    machine: dict[str, Any] = field(default_factory=dict)
    loaded: dict[str, Any] = field(default_factory=dict)
    speeds: list[dict[str, Any]] = field(default_factory=list)
    profiles: dict[str, Any] = field(default_factory=dict)
    lens: dict[str, dict[str, float]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    captures: list[dict[str, Any]] = field(default_factory=list)
    threads: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    compiled: dict[str, Any] = field(default_factory=dict)
    tests: str = ""
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    test_output: str = ""

    def add_speed(self, worker: str, what: str, batch: int, speeds: list[float], peak_gb: float) -> None:
        self.speeds.append({"worker": worker, "what": what, "batch": batch, "speeds": speeds, "peak_GB": peak_gb})

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def markdown(self) -> str:
        """All tables that have rows."""
        lines = ["# On a GPU", "", self._introduction(), ""]
        lines += (
            self._speed_table()
            + self._profile_table()
            + self._lens_table()
            + self._capture_table()
            + self._thread_table()
            + self._memory_table()
        )
        if self.tests:
            lines += [f"Tests of the model on the device: {self.tests}.", ""]
        lines += [f"- {each}" for each in (*self.failures, *self.notes)]
        return "\n".join(lines).rstrip() + "\n"

    def _introduction(self) -> str:
        machine = ", ".join(
            f"{name} {value:.0f}" if isinstance(value, float) and value > 100 else f"{name} {value}"
            for name, value in self.machine.items()
            if name != "model_GB"
        )
        shape = "Gemma-2-2B" if self.shape == "gemma-2-2b" else f"a {self.shape} model"
        before = "; `before` is the tree of --baseline, measured in turn with `this`" if "before" in self.trees else ""
        loading = ", ".join(f"{name} {each['seconds']:.1f} s" for name, each in self.loaded.items())
        return (
            f"Written by `make bench-gpu`: {machine}. Random weights in the shape of {shape} "
            f"({self.machine.get('model_GB', 0):.1f} GB), prompts of 100 tokens, 50 new tokens, medians of "
            f"{self.rounds} rounds{before}. Loading: {loading}."
        )

    def _median(self, worker: str, what: str, batch: int) -> float | None:
        found = [
            each["speeds"]
            for each in self.speeds
            if (each["worker"], each["what"], each["batch"]) == (worker, what, batch)
        ]
        return statistics.median(found[0]) if found else None

    def _speed_table(self) -> list[str]:
        if not self.speeds:
            return []
        lines = [
            "| batch | what | who | tokens/s | spread | / Hugging Face plain | / nothing captured | peak GB |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for each in sorted(self.speeds, key=lambda row: row["batch"]):
            worker, what, batch = each["worker"], each["what"], each["batch"]
            median = statistics.median(each["speeds"])
            plain = self._median("hugging face", "temperature 0.7" if what == "temperature 0.7" else "plain", batch)
            nothing = self._median(worker, "nothing", batch) if worker != "hugging face" else None
            cells = [
                str(batch),
                what,
                worker,
                f"{median:,.0f}",
                f"{min(each['speeds']):,.0f} to {max(each['speeds']):,.0f}",
                f"{median / plain:.2f}" if plain else "",
                f"{median / nothing:.2f}" if nothing else "",
                f"{each['peak_GB']:.1f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        for found in self.compiled.values():
            speed, peak = found["tokens"] / found["seconds"], found.get("peak_GB", 0)
            lines.append(f"| 64 | static cache and compile | hugging face | {speed:,.0f} | one call | | | {peak:.1f} |")
        if floor := self.machine.get("copy_GB_per_s"):
            for batch in sorted({each["batch"] for each in self.speeds}):
                speed = batch * floor / self.machine["model_GB"]
                lines.append(f"| {batch} | {_BANDWIDTH} | the card | {speed:,.0f} | | | | |")
        return [*lines, ""]

    def _profile_table(self) -> list[str]:
        if not self.profiles:
            return []
        names = [name for name in next(iter(self.profiles.values())) if name != "kernels"]
        lines = [
            "A step of ten prompts with all residual points, by the profiler:",
            "",
            "| who | " + " | ".join(names) + " |",
            "| --- |" + " --- |" * len(names),
        ]
        for worker, found in self.profiles.items():
            lines.append(f"| {worker} | " + " | ".join(f"{found[name]:.1f}" for name in names) + " |")
        for worker, found in self.profiles.items():
            lines += [
                "",
                f"Its slowest kernels ({worker}):",
                "",
                "| kernel | ms a step | launches |",
                "| --- | --- | --- |",
            ]
            lines += [f"| `{name}` | {ms:.3f} | {n:.1f} |" for name, (ms, n) in found.get("kernels", {}).items()]
        return [*lines, ""]

    def _lens_table(self) -> list[str]:
        lines = []
        for worker, found in self.lens.items():
            lines += [f"The logit lens of one prompt and its response, and its slowest kernels ({worker}):", ""]
            lines += ["| what | ms |", "| --- | --- |", *(f"| `{name}` | {ms:.2f} |" for name, ms in found.items()), ""]
        return lines

    def _capture_table(self) -> list[str]:
        if not self.captures:
            return []
        lines = [
            "`tlcapture capture` in batches of 64 prompts, with the files of all layers and points:",
            "",
            "| prompts | files in | what | who | seconds | tokens/s | files | GB | GB/s |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for each in self.captures:
            cells = [
                str(each["prompts"]),
                each["place"],
                each["what"],
                each["tree"],
                f"{each['seconds']:.1f}",
                f"{each['tokens_per_s']:,.0f}",
            ]
            cells += [f"{each['files']:,}", f"{each['GB']:.2f}", f"{each['GB'] / each['seconds']:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
        return [*lines, "", "Seconds are those that the command reports, with loading the model.", ""]

    def _thread_table(self) -> list[str]:
        lines = []
        for what, threads in self.threads.items():
            lines += [f"Where threads of the command were ({what}), seconds with what each function calls:", ""]
            lines += ["| thread | function | seconds |", "| --- | --- | --- |"]
            for thread, functions in threads.items():
                lines += [f"| {thread} | {name or 'all'} | {seconds:.2f} |" for name, seconds in functions.items()]
            lines.append("")
        return lines

    def _memory_table(self) -> list[str]:
        if not self.memory:
            return []
        lines = [
            "4,096 tokens of context (4,046 and 50 new), one prompt:",
            "",
            "| who | peak GB | seconds |",
            "| --- | --- | --- |",
        ]
        for worker, found in self.memory.items():
            lines.append(f"| {worker} | {found.get('peak_GB', 0):.1f} | {found['seconds']:.2f} |")
        return [*lines, ""]
