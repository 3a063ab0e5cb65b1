"""What only a GPU can tell: ceilings, kernels, whole models, start-up and the conformance kit, one module a part.

``bench/gpu.sh`` runs them (:mod:`gpu.run`); each part also runs alone, ``python -m gpu.engine --help``, with ``bench``
on the path. A part adds a row to a file of JSON lines as soon as it has measured it (:mod:`gpu.rows`), so that what ends a
part loses only what was still to come.
"""
