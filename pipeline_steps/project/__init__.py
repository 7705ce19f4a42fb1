"""Project folders beside the source checkout: their `dvc.yaml`, and the digests of the code that their stages use.

The files that are no Python are links to files of the repository; a wheel holds copies of them.
"""
