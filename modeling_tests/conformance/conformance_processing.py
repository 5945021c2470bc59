"""ProcessorTesterMixin against LinVTProcessor, around several bases' processors."""

import inspect
import tempfile
import unittest
from pathlib import Path
from unittest.mock import patch

import numpy as np
from tests.test_processing_common import ProcessorTesterMixin
from tiny_wrapped import wrapped
from video_files import moving_square, write_video

from linvt_hf import LinVTProcessor


class LinVTProcessorTests(ProcessorTesterMixin):
    base: str
    processor_class = LinVTProcessor

    @classmethod
    def _setup_from_components(cls):
        return wrapped(cls.base).processor

    @classmethod
    def _setup_test_attributes(cls, processor):
        super()._setup_test_attributes(processor)
        cls.image_token = processor.tokenizer.image_token

    @classmethod
    def prepare_processor_dict(cls):
        processor = wrapped(cls.base).processor
        parts = {"self", *processor.get_attributes()}
        arguments = inspect.signature(LinVTProcessor.__init__).parameters.keys() - parts
        return {name: getattr(processor, name) for name in sorted(arguments) if getattr(processor, name) != {}}

    def setUp(self):
        # Saving a processor with custom code, transformers leaves `auto_map` on the one that was saved.
        patcher = patch.object(LinVTProcessor, "_auto_class", None)
        patcher.start()
        self.addCleanup(patcher.stop)

    def prepare_audio_inputs(self, batch_size=None):
        """None: LinVT reads no audio."""

    def prepare_videos_inputs(self, batch_size=None):
        """Channels last, as LinVT takes videos; upstream's are channels first."""
        video = np.random.default_rng(0).integers(0, 256, (8, 40, 56, 3), dtype=np.uint8)
        return video if batch_size is None else [video] * batch_size

    def test_model_input_names(self):
        with tempfile.TemporaryDirectory() as folder:  # of the videos LinVT takes, a file gives all inputs
            video = write_video(Path(folder, "video.mp4"), moving_square())
            with patch.object(self, "prepare_videos_inputs", lambda: str(video)):
                super().test_model_input_names()

    def test_processor_with_multiple_inputs(self):
        self.video_token = ""  # without a video processor this test gives no video
        super().test_processor_with_multiple_inputs()


class Qwen2VLProcessorTest(LinVTProcessorTests, unittest.TestCase):
    base = "qwen2_vl"


class LlavaProcessorTest(LinVTProcessorTests, unittest.TestCase):
    base = "llava"


class InternVLProcessorTest(LinVTProcessorTests, unittest.TestCase):
    base = "internvl_qwen2"
