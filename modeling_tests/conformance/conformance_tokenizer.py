"""ModelTesterMixin against the LinearVideoTokenizer alone: visual tokens in, their linear combinations out."""

import unittest

import torch
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin
from tiny_wrapped import SETTINGS

from linvt_hf import LinearVideoTokenizer, LinVTConfig


class TokenizerTester:
    batch_size, frames, places, hidden_size = 2, 3, 4, 32
    is_training = False  # it has no loss of its own

    def get_config(self):
        return LinVTConfig(hidden_size=self.hidden_size, **SETTINGS)

    def prepare_config_and_inputs_for_common(self):
        torch.manual_seed(0)
        inputs = {
            "visual_tokens": torch.randn(self.batch_size, self.frames, self.places, self.hidden_size),
            "text_embeds": torch.randn(self.batch_size, 5, self.hidden_size),
        }
        return self.get_config(), inputs


class LinearVideoTokenizerTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (LinearVideoTokenizer,)
    test_resize_embeddings = False
    has_attentions = False  # its maps have other shapes than a language model's
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = TokenizerTester()

    def test_config(self):
        fields = {"hidden_size": 32, **SETTINGS}
        ConfigTester(self, config_class=LinVTConfig, has_text_modality=False, **fields).run_common_tests()
