"""ConfigTester and ModelTesterMixin against LinVTForConditionalGeneration, around several bases."""

import copy
import json
import unittest
from unittest.mock import patch

from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin
from tiny_wrapped import SETTINGS, LinVTModelTester, wrapped
from transformers import PreTrainedModel

from linvt_hf import LinVTConfig, LinVTForConditionalGeneration


class LoadsAnything(LinVTForConditionalGeneration):
    """Without LinVT's own check after loading, under the same name."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return PreTrainedModel.from_pretrained.__func__(cls, *args, **kwargs)


LoadsAnything.__name__ = LinVTForConditionalGeneration.__name__


class LinVTTests(ModelTesterMixin, GenerationTesterMixin):
    base: str
    all_model_classes = (LinVTForConditionalGeneration,)
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True  # upstream looks for a year in the file's first lines
    skip_test_image_features_output_shape = True  # looks for `vision_config`, which is the base's

    def setUp(self):
        self.model_tester = LinVTModelTester(self.base)

    def _image_features_prepare_config_and_inputs(self):
        return self.model_tester.get_config(), copy.deepcopy(wrapped(self.base).image_inputs)

    def _video_features_prepare_config_and_inputs(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return config, LinVTForConditionalGeneration.take_video_inputs(inputs)

    def test_config(self):
        # Upstream compares these fields with the saved ones; a config inside another is saved with all of its own.
        saved = json.loads(self.model_tester.get_config().to_json_string(use_diff=True))
        fields = {"base_config": saved["base_config"], **SETTINGS}
        ConfigTester(self, config_class=LinVTConfig, has_text_modality=False, **fields).run_common_tests()

    # LinVT refuses a folder whose weights are missing, which these load; they see the loader under that check.

    def test_model_weights_reload_no_missing_tied_weights(self):
        with patch.object(type(self), "all_model_classes", (LoadsAnything,)):
            super().test_model_weights_reload_no_missing_tied_weights()

    def test_can_init_all_missing_weights(self):
        with patch.object(type(self), "all_model_classes", (LoadsAnything,)):
            super().test_can_init_all_missing_weights()

    def test_tied_weights_keys(self):
        # Upstream ties the outer config and the innermost; a base reads its own, which lies between them.
        self.model_tester.tied = True
        super().test_tied_weights_keys()


class Qwen2VLTest(LinVTTests, unittest.TestCase):
    base = "qwen2_vl"


class InternVLTest(LinVTTests, unittest.TestCase):
    base = "internvl_qwen2"


class LlavaTest(LinVTTests, unittest.TestCase):
    base = "llava"
    test_all_params_have_gradient = False  # the last layer of its vision encoder is computed but not used


class LlavaOnevisionTest(LinVTTests, unittest.TestCase):
    base = "llava_onevision"
    # Its features come before the vision encoder's last norm.
    test_all_params_have_gradient = False


class MiphaTest(LinVTTests, unittest.TestCase):
    base = "mipha"
    # Its features come from the last layer but one of its vision encoder.
    test_all_params_have_gradient = False
