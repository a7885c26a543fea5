"""Seeds made of several numbers, so that random draws depend on what they are for and on nothing else."""

import numpy as np


def mixed_seed(*parts: int) -> int:
    """Returns a seed for torch's CPU generator, which uses 32 bits, that depends on every part."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
