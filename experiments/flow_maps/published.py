"""What papers and repositories publish on ImageNet 256 in few steps: FID of 50,000 samples, as stated there.

Epochs, autoencoders, guidance and nets differ from row to row: no two rows are a controlled comparison.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """One line: parameters in millions, epochs of 1.28 million images, FID in 1, 2, 4 and 8 steps, guidance, source."""

    method: str
    parameters: str
    epochs: str
    one: str
    two: str
    four: str
    eight: str
    guidance: str
    source: str


TABLE = (
    Published("IMM-XL/2", "675", "3,840", "8.05", "3.99", "2.51", "1.99", "at sampling, 1.5", "arXiv 2503.07565"),
    Published("Shortcut-B", "130", "162", "40.3", "", "28.3", "", "in training, 1.5", "kvfrans/shortcut-models"),
    Published("Shortcut-XL", "675", "162", "10.6", "", "7.8", "", "in training, 1.5", "kvfrans/shortcut-models"),
    Published("MeanFlow-B/2", "131", "240", "6.17", "", "", "", "in training", "arXiv 2505.13447"),
    Published("MeanFlow-XL/2", "676", "240", "3.43", "2.93", "", "", "in training", "arXiv 2505.13447"),
    Published("alpha-Flow-XL/2+", "676", "", "2.58", "2.15", "", "", "in training", "arXiv 2510.20771"),
    Published("SoFlow-B/2", "131", "240", "4.85", "4.24", "", "", "in training", "zlab-princeton/SoFlow"),
    Published("SoFlow-XL/2", "676", "240", "2.96", "2.66", "", "", "in training", "zlab-princeton/SoFlow"),
    Published("ESC-XL/2", "676", "480", "2.53", "", "", "", "in training", "EDAPINENUT/ExplicitShortCut"),
    Published("TVM-XL/2", "675", "", "3.29", "", "1.99", "", "in training", "lumalabs/tvm"),
    Published("iMF-B/2", "89", "640", "3.39", "", "", "", "a condition", "Lyy-iiis/imeanflow"),
    Published("iMF-XL/2", "610", "", "1.72", "1.54", "", "", "a condition", "Lyy-iiis/imeanflow"),
)
HEAD = ("method", "parameters, M", "epochs", "1 step", "2", "4", "8", "guidance", "source")
