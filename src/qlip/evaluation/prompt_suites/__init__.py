"""Benchmarks of text to image: images in the layouts that official scorers read, and made scenes with their score.

`open_suite` (`layouts`) makes a `Suite` from a benchmark's own prompt files (`prompts`), `adm` from classes and
`scenes` from made scenes; `draw_suite` (`run`) draws it by a function from prompts to images, and continues where it
was stopped; `score_scenes` checks.
"""

from qlip.evaluation.prompt_suites.layouts import ADM_IMAGES, SUITES, Suite, adm, open_suite
from qlip.evaluation.prompt_suites.run import draw_suite
from qlip.evaluation.prompt_suites.scenes import scenes, scenes_result, score_scenes

__all__ = [
    "ADM_IMAGES",
    "SUITES",
    "Suite",
    "adm",
    "draw_suite",
    "open_suite",
    "scenes",
    "scenes_result",
    "score_scenes",
]
