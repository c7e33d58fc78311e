"""How the pipelines of the zoo are made: ``python -m recipes.tiny_fashion train unet``, then ``export``.

Durations are in images, all randomness comes from one generator, and a run that is stopped and resumed ends
with the same bits as a run that is not (on one machine, with the same number of threads).
"""
