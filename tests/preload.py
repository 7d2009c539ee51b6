"""What worker processes find imported: the fork server loads this once for the whole test session."""

import webdataset  # noqa: F401

import imm_scale.cli
import imm_scale.evaluation.command
import imm_scale.report.runs
import imm_scale.training.trainer  # noqa: F401
