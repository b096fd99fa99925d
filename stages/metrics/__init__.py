"""Every metric by the name it has in results.json. A new one is a new file and a new row here; which of them apply to a set of
samples is decided by the fields it has."""

from stages.metrics.bits_per_byte import BitsPerByte
from stages.metrics.bits_per_pixel import BitsPerPixel
from stages.metrics.caption_correctness import CaptionCorrectness
from stages.metrics.codebook import Codebook
from stages.metrics.edit_accuracy import EditAccuracy
from stages.metrics.frechet import FrechetDistance
from stages.metrics.perceptual_distance import PerceptualDistance
from stages.metrics.psnr import PSNR
from stages.metrics.question_accuracy import QuestionAccuracy
from stages.metrics.retrieval import Retrieval
from stages.metrics.scene_accuracy import ReconstructedScenes, SceneAccuracy
from stages.metrics.score import Metric
from stages.metrics.ssim import SSIM
from stages.metrics.tool_calls import ToolCalls

METRICS: dict[str, type[Metric]] = {
    "scene-accuracy": SceneAccuracy,
    "edit-accuracy": EditAccuracy,
    "question-accuracy": QuestionAccuracy,
    "caption-correctness": CaptionCorrectness,
    "bits-per-byte": BitsPerByte,
    "retrieval": Retrieval,
    "tool-calls": ToolCalls,
    "psnr": PSNR,
    "ssim": SSIM,
    "perceptual-distance": PerceptualDistance,
    "reconstructed-scenes": ReconstructedScenes,
    "codebook": Codebook,
    "bits-per-pixel": BitsPerPixel,
    "frechet-distance": FrechetDistance,
}
