"""The entry point by which lmms-eval finds this package's models; it imports nothing that is not needed for that."""


def manifest():
    from lmms_eval.models.registry_v2 import ModelManifest

    home = "linvt_hf.evaluation.lmms_model"
    return ModelManifest("linvt", simple_class_path=f"{home}.LinVTSimple", chat_class_path=f"{home}.LinVT")
