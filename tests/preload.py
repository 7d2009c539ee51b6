"""What worker processes find imported: the fork server loads this once for the whole test session."""

import gc

import webdataset  # noqa: F401

import imm_scale.cli
import imm_scale.evaluation.command
import imm_scale.report.runs
import imm_scale.training.trainer  # noqa: F401
from imm_scale.parallel.deepspeed_engine import _import_deepspeed

_import_deepspeed()

# Worker processes would look through all of it again and again: at every collection, which closing an engine asks for.
gc.collect()
gc.freeze()
