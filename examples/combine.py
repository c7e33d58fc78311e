"""Combination of checkpoints: a short run that keeps its raw weights, and the best combination of them.

The command line is ``diffaccel combine``. At these sizes the figures are noise: by default a search has 300
evaluations of 1,000 images.
"""

from pathlib import Path

from diffaccel import distill, zoo
from diffaccel.distill.combine import Plan, combine, host_of_run

out = Path("out/examples/combine")
name = "tiny-fashion-dit-2rf"
teacher = zoo.load(name)
teacher.set_progress_bar_config(disable=True)
labels = zoo.LABELS[:10]
distill.make_pairs(out / "pairs", teacher, labels, count=32, steps=2, guidance=1.0, model=name)

run = distill.start(distill.Config(
    teacher=name, pairs=str(out / "pairs"), run=str(out / "run"), steps=(1,), images=64,
    batch=8, lr=1e-4, warmup_images=0, keep_images=16, eval_count=0, options={"premetric": "huber"},
))  # fmt: skip
run.trainer.fit()

plan = Plan(steps=1, metric="fd", protocol="fashion", budget=6, images=16, batch=80)
record = combine(plan, [run.folder], host_of_run(run, "cpu"), out / "combined",
                 reference=zoo.reference()[0][:1000])  # fmt: skip
print("coefficients:", [round(value, 3) for value in record["coefficients"]])
for label, scores in {**record["averages"], "combined": record["scores"]}.items():
    print(f"{label:12}Frechet distance on the noise of the search {scores['search']:.3f}, "
          f"held out {scores['held_out']['fd']['value']:.3f}")  # fmt: skip
