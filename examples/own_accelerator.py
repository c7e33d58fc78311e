"""An accelerator of one's own: a subclass with a name, which wraps the evaluations of the network."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from diffaccel import Accelerator, zoo
from diffaccel.pipelines import Evaluation, Run, option


@dataclass
class Tail(Accelerator):
    """Evaluates the network at the first steps only, and repeats its last output to the end."""

    name: ClassVar[str] = "tail"
    exclusive: ClassVar[str] = "skip"  # a stack has one of this kind
    share: float = option(0.8, low=0.1, high=1.0)

    def start(self, run: Run) -> None:
        """Forgets the last loop."""
        self.last: dict[Any, Any] = {}

    def evaluate(self, call: Evaluation, proceed: Any) -> Any:
        """Skips the evaluation, or runs it and keeps its output."""
        key = (call.network, call.branch, call.rows)
        if call.step >= self.share * call.run.num_updates and key in self.last:
            call.log(self, "skip", range(call.run.batch))
            return self.last[key]
        self.last[key] = output = proceed(call)
        return output


pipe = zoo.load("tiny-fashion-dit")
pipe.set_progress_bar_config(disable=True)
pipe.to(accel={"tail": {"share": 0.7}})  # known by its name now; `diffaccel list` shows those of the package
pipe([pipe.labels["bag"]], generator=torch.Generator().manual_seed(0), num_inference_steps=20)
print(pipe.accel)
