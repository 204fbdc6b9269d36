"""Changes to DeepSpeed's own behaviour, each with its reason; idempotent, made when called, which imports it."""

_SHM_OP = "deepspeed_shm_comm"


def skip_shm_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce; call it before deepspeed.initialize.

    On CPU every start builds or loads that extension: about 60 CPU seconds the first time, and a process
    killed meanwhile leaves a lock on which all later runs wait for ever. It serves only
    `inference_all_reduce`, which training never calls. DeepSpeed has no setting for it; it builds what the
    private table of compatible operations allows, so the entry is turned off there. On GPU it changes
    nothing: the builder exists on CPU only.
    """
    import deepspeed

    table = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(table, dict):
        table[_SHM_OP] = False
