"""The evaluation harness from Python: scores with errors under a named protocol, and paired fidelity.

The command line is ``diffaccel eval tiny-fashion-dit --accel sada --protocol fashion``.
"""

from diffaccel import zoo
from diffaccel.eval import Extractor, Sampler, fidelity, measure, protocol

pipe = zoo.load("tiny-fashion-dit")
pipe.set_progress_bar_config(disable=True)
labels = [zoo.LABELS[number] for number in zoo.labels(16)]
sample = Sampler(pipe, labels, steps=20, guidance=2.5, seed=0)  # image n has the seed n of its own

plain = sample()
pipe.to(accel="sada")
fast = sample()
print(f"RMS error of SADA against the plain run: {fidelity(fast, plain).rms:.4f}")

extractor = Extractor(protocol("fashion"))  # "clean", "adm", "dgm_dinov2", ... for other models
reference = zoo.reference()[0][:1000]  # a tensor of bytes; folders, zip and npz files will do as well
for name, images in {"plain": plain, "sada": fast}.items():
    record = measure(images, reference, extractor, ("fid", "kid"))
    for metric, score in record["scores"].items():
        print(f"{name:6}{metric:14}{score['value']:.4f} ± {score['se']:.4f}")
