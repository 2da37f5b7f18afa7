"""What of the package is public, and the check that the reference has all of it.

Public is each name without a leading underscore that a module defines, and each such member of a
public class, unless `INTERNAL` says otherwise; of a package, what its `__all__` names. A module is
in `PUBLIC` or in `INTERNAL`, so somebody has to decide on a new one.
"""

import ast
import contextlib
import inspect
import pkgutil
import re
from collections import Counter
from importlib import import_module

from sphinx.util import logging

PACKAGE = "patchsvdd_fast"

PUBLIC = (
    "detector.categories",
    "detector.description",
    "detector.evaluation",
    "detector.encoder_file",
    "detector.model_file",
    "detector.onnx",
    "detector.patch_svdd",
    "encoders.backbone",
    "encoders.efficientnet_lite",
    "encoders.levels",
    "encoders.patch_encoder",
    "encoders.patch_svdd",
    "encoders.precision",
    "encoders.pretrained",
    "files.categories",
    "files.folders",
    "files.layouts",
    "files.masks",
    "files.pages",
    "files.sources",
    "images.drift",
    "images.gallery",
    "images.light",
    "images.prepare",
    "images.samples",
    "ops.pair_protocol",
    "ray_data",
    "report.display",
    "report.entries",
    "report.heat_maps",
    "report.html",
    "report.map_files",
    "report.masks",
    "report.side_by_side",
    "report.start_page",
    "report.table",
    "score.calibration",
    "score.encoding",
    "score.image_result",
    "score.maps",
    "score.metrics",
    "score.regions",
    "score.reweighting",
    "score.stream",
    "search.bank",
    "search.coreset",
    "search.identified",
    "search.larger_than_card",
    "search.neighbors",
    "search.sharded",
    "training.log",
    "training.record",
    "training.settings",
)

# Rooms, modules and names that anyone may change at any time, and why nobody needs them.
INTERNAL = {
    # --- rooms and modules ---
    "cli": "the command line, which command-line.md describes",
    "detector.filling": "what PatchSVDD.fit does after training",
    "detector.fitting": "what PatchSVDD.fit does",
    "detector.changes": "methods of PatchSVDD",
    "detector.forecast": "how long PatchSVDD.fit says it will take",
    "detector.progress_bars": "what PatchSVDD.fit tells its on_progress, and how that is shown",
    "detector.normality": "what PatchSVDD.add, remove, merge and refit do",
    "detector.onnx_check": "the checks of the models that detector.onnx writes",
    "detector.parameters": "what the parameters of PatchSVDD mean",
    "detector.shards": "what PatchSVDD.save and load do with banks in shards",
    "detector.scoring": "what PatchSVDD.encode and score_stream do",
    "detector.thresholds": "a base class of PatchSVDD, which has its members",
    "detector.explanations": "likewise",
    "files.claims": "what the commands do before they write to a file or a folder",
    "encoders.onnx_encoder": "a part of the models that detector.onnx writes",
    "files.onnx_graph": "what detector.onnx builds its models with",
    "files.shards": "models in several files, which file-format.md describes",
    "files.store": "the format of model files, which file-format.md describes",
    "files.whole": "how every file is written",
    "images.arrays": "what load_image_set makes of arrays and tensors",
    "images.deep_files": "how read_image reads files of more than 8 bits",
    "images.drawn_defects": "what the checks during training draw",
    "images.onnx_pixels": "a part of the models that detector.onnx writes",
    "images.sample_cloth": "the sample of `patchsvdd demo` and of example.ipynb",
    "ops.backends": "how ops are registered; its settings of searches are names of ops",
    "ops.checks": "checks of arguments",
    "ops.cpu_bank": "the arrays of a NormalBank with clusters, for the kernels of a CPU",
    "ops.cpu_codes": "the arrays of a NormalBank without clusters, for the kernels of a CPU",
    "ops.gpu_bank": "likewise, for those of a GPU",
    "ops.patches": "ops as torch sees them; their functions are names of ops",
    "ops.radius": "how within calls the kernels; its functions are names of ops",
    "ops.reference": "what the tests compare the kernels with",
    "ops.search": "ops as torch sees them; their functions are names of ops",
    "ops.search_kernels": "how searches and select_coreset call the kernels",
    "report.captions": "text in the pictures of heat_maps and side_by_side",
    "report.charts": "a part of the page that ReportWriter writes",
    "report.figures": "a part of the page that ReportWriter writes",
    "report.pictures": "a part of the page that ReportWriter writes",
    "report.summary": "lines that the commands and ReportWriter write",
    "report.text": "a part of the page that ReportWriter writes",
    "score.border": "how maps are corrected near the border, a part of MapRule",
    "score.onnx_scoring": "a part of the models that detector.onnx writes",
    "search.centroids": "how a NormalBank is clustered",
    "search.cpu_choice": "how a NormalBank on a CPU is laid out",
    "search.cpu_clusters": "how a NormalBank is clustered on a CPU",
    "search.gpu_clusters": "how a NormalBank is clustered on a GPU",
    "search.index": "the rows of a NormalBank and how they are searched",
    "search.index_state": "the tensors of NormalBank.state_dict, which file-format.md describes",
    "search.processes": "what the processes of a ShardedBank tell each other",
    "search.rounds": "how PatchSVDD searches a ShardedBank",
    "training.checkpoints": "what PatchSVDD.fit does with `checkpoint` and `resume`",
    "training.defect_check": "what PatchSVDD.fit does with `check_every`",
    "training.dense_pairs": "the objective of mode dense",
    "training.interrupts": "how Ctrl-C ends PatchSVDD.fit",
    "training.objectives": "the objective of mode faithful",
    "training.trainer": "what PatchSVDD.fit runs",
    "training.workers": "what PatchSVDD.fit does under torchrun",
    # --- names in modules that are public otherwise ---
    "detector.evaluation.share_evaluation": "what other processes do while the first evaluates",
    "files.categories.scored_paths": "which images of a folder PatchSVDD.score takes",
    "images.prepare.PathsIn": "a part of load_image_set",
    "training.record.moments": "how PatchSVDD.fit notices a collapse of banks in shards",
    "training.record.have_collapsed": "likewise",
    "images.light.of_one_process": "a default of mean_image",
    "detector.model_file.Model": "a fitted detector as a plain value, between it and its file",
    "detector.model_file.differences": "what PatchSVDD.merge checks",
    "detector.encoder_file.CALIBRATION_SCHEMA": "how older files are opened",
    "detector.encoder_file.encoder_of": "a part of load_encoder",
    "detector.encoder_file.refuse_bank": "likewise",
    "detector.categories.by_category": "what the commands do with a model of either kind",
    "detector.categories.require_category": "what the commands check first",
    "detector.categories.check_names": "likewise",
    "detector.categories.thresholds_of": "likewise",
    "report.start_page.linked_folders": "what another run's page leads to, for the commands",
    "detector.categories.score_stream": "score_stream of PatchSVDD or CategoryDetectors",
    "detector.model_file.load_models": "PatchSVDD.load",
    "detector.encoder_file.parameters_in": "a part of load_models",
    "detector.model_file.prefix_of": "how the tensors of a category are named",
    "detector.model_file.prefixes_in": "likewise",
    "detector.model_file.save_model": "PatchSVDD.save",
    "detector.model_file.save_models": "CategoryDetectors.save",
    "detector.patch_svdd.PatchSVDD.model": "the detector as a plain value",
    "detector.patch_svdd.PatchSVDD.of_model": "its inverse",
    "detector.patch_svdd.PatchSVDD.file_": "how a model file that was changed is noticed",
    "encoders.levels.as_levels": "what `levels` means",
    "encoders.patch_encoder.device_of": "where encode_images computes",
    "encoders.patch_svdd.LEAKY_SLOPE": "of the encoder's layers",
    "encoders.patch_svdd.QuadrantHead": "a part of HierarchicalEncoder",
    "encoders.patch_svdd.SMALL_PATCH": "HierarchicalEncoder.patch_sizes",
    "encoders.patch_svdd.SmallEncoder": "a part of HierarchicalEncoder",
    "encoders.patch_svdd.TRUNK_STRIDE": "of the encoder's layers",
    "encoders.patch_svdd.from_official_names": "a part of load_official_checkpoint",
    "encoders.precision.fastest_layout": "what Trainer sets",
    "encoders.precision.warn_of_slow_bfloat16": "what PatchSVDD.fit warns of",
    "encoders.precision.flushed_denormals": "what Trainer sets",
    "encoders.pretrained.Stages": "a part of encoders from torchvision",
    "encoders.pretrained.weights_package": "what messages name",
    "encoders.pretrained.rebuilt_encoder": "a part of PatchSVDD.load",
    "files.pages.check_pages": "a part of image_sources",
    "files.pages.num_pages": "a part of page_paths",
    "files.pages.with_every_page": "a part of load_image_set",
    "files.sources.require_given": "what the commands check before they write",
    "files.sources.require_there": "likewise",
    "images.light.constant_mean": "what the mean `fixed` subtracts",
    "images.gallery.evenly_spread": "which images are tried, set aside or fitted to",
    "images.prepare.name_of": "ImageResult.name",
    "images.prepare.read_deep_samples": "what load_image_set looks at first",
    "images.prepare.survey_images": "what CategoryDetectors.fit looks at first",
    "files.folders.counted": "words of messages, such as 1 image and 2 images",
    "files.folders.report_unreadable": "the error or warning of skip_unreadable",
    "files.folders.some_of": "words of messages, such as 4 (a.png, b.png, c.png, ...)",
    "files.masks.has_proportions_of": "a warning of masks_or_reason",
    "files.masks.images_and_masks": "a part of labelled",
    "files.masks.masks_alone": "likewise",
    "files.masks.without_masks": "a part of training_paths",
    "images.samples.DeepSamples": "a type of arguments",
    "images.samples.DEEPEST": "the last of DEPTHS",
    "images.samples.rounded_up": "a part of survey",
    "images.samples.samples_from_header": "a part of PatchSVDD.load",
    "images.samples.scaled": "a part of read_image",
    "ops.pair_protocol.Draw": "the arguments of crop_pairs, together",
    "report.html.page_parts": "a part of write_start_page",
    "report.html.GENERATOR": "how the command line knows a report",
    "report.html.is_report": "likewise",
    "report.display.html_of_image": "what ImageResult shows in a notebook",
    "report.display.html_of_images": "what ScoredImages shows in a notebook",
    "report.display.plot_image": "ImageResult.plot",
    "report.display.plot_images": "ScoredImages.plot",
    "score.image_result.ScoredImages.of": "a part of PatchSVDD.score",
    "score.regions.level_of_peak": "ImageResult.level",
    "score.image_result.relative": "ImageResult.relative_score",
    "score.image_result.image_results": "a part of PatchSVDD.score_stream",
    "score.maps.check_combination": "what checks `combination`",
    "score.maps.interpolation_weights": "a part of MapRule.map",
    "score.maps.scores_of": "ScoreResult.image_scores",
    "score.metrics.BoolArray": "a type of arguments",
    "score.metrics.FloatArray": "a type of arguments",
    "score.reweighting.check_reweight": "what checks `reweight`",
    "score.stream.Encoded": "a type of arguments",
    "score.stream.Result": "a type of results",
    "search.coreset.as_count": "what the size of a coreset means",
    "search.coreset.is_screened": "for the forecast of a fit's time",
    "score.calibration.pixel_step": "for the forecast of a fit's time",
    "training.record.record_of": "what reads a TrainingRecord from a file",
    "training.record.warn_of_collapse": "what warns with a CollapseWarning",
}


def definitions(body):
    """The docstrings of what statements define, by name; without names that begin with "_"."""
    found = {}
    for statement, following in zip(body, [*body[1:], None], strict=False):
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names, text = [statement.name], ast.get_docstring(statement)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = getattr(statement, "targets", None) or [statement.target]
            nodes = (node for target in targets for node in ast.walk(target))
            names = [node.id for node in nodes if isinstance(node, ast.Name)]
            constant = isinstance(following, ast.Expr) and getattr(following.value, "value", None)
            text = constant if isinstance(constant, str) else None
        elif isinstance(statement, ast.If | ast.Try):
            found |= definitions(statement.body) | definitions(statement.orelse)
            continue
        else:
            continue
        for name in names:
            if not name.startswith("_"):
                found[name] = found.get(name) or text
    return found


def home_of(owner, name):
    """Where what a module or class has under this name is defined, as a full name."""
    value = getattr(owner, name, None)
    if inspect.ismodule(owner) and (inspect.isclass(value) or inspect.isfunction(value)):
        return f"{value.__module__}.{value.__qualname__}"
    if inspect.isclass(owner):
        return f"{owner.__module__}.{owner.__qualname__}.{name}"
    return f"{owner.__name__}.{name}"


def modules_of(package):
    """The package's modules by name, itself first; not those with a leading underscore."""
    root = import_module(package)
    found = {package: root}
    for module in pkgutil.walk_packages(root.__path__, f"{package}."):
        if not any(part.startswith("_") for part in module.name.split(".")):
            found[module.name] = import_module(module.name)
    return found


def public_names(package, public, internal):
    """The docstring of each public name and member by its full name; and what is undecided.

    public, internal: as `PUBLIC` and `INTERNAL`.
    """
    problems = []
    modules = modules_of(package)
    public = {f"{package}.{name}" for name in public}
    internal = {f"{package}.{name}" for name in internal}
    existing, names = set(modules), {}

    def is_internal(name):
        parts = name.split(".")
        return any(".".join(parts[:end]) in internal for end in range(1, len(parts) + 1))

    def take(name, text, value):
        existing.add(name)
        if name in internal:
            return
        names[name] = text
        if inspect.isclass(value):
            for base in reversed(value.__mro__):
                if base.__module__.split(".")[0] == package:
                    (tree,) = ast.parse(inspect.getsource(base)).body
                    for member, its_text in definitions(tree.body).items():
                        full_name = home_of(value, member)
                        take(full_name, its_text or names.get(full_name), None)

    for module_name, module in modules.items():
        is_package = hasattr(module, "__path__")
        listed = getattr(module, "__all__", ()) if is_package else ()
        for name in listed:
            if not name.startswith("_"):
                value = getattr(module, name)
                home, _, last = home_of(module, name).rpartition(".")
                defined = definitions(ast.parse(inspect.getsource(import_module(home))).body)
                take(f"{home}.{last}", defined.get(last), value)
        if is_internal(module_name):
            if module_name in public:
                problems.append(f"{module_name} is listed as public and as internal")
            # Its names may still be listed: they are public where a package has them.
            existing |= {f"{module_name}.{name}" for name in vars(module)}
        elif is_package or module_name in public:
            for name, text in definitions(ast.parse(inspect.getsource(module)).body).items():
                take(f"{module_name}.{name}", text, getattr(module, name, None))
        else:
            problems.append(f"{module_name} is neither in PUBLIC nor in INTERNAL")
    gone = sorted((public | internal) - existing)
    problems += [f"{name} is listed, but does not exist" for name in gone]
    return names, problems


def documented_names(objects):
    """Where what the reference documents is defined; objects: full names as they stand there."""
    found = set()
    for full_name in objects:
        owner, _, name = full_name.rpartition(".")
        value = _resolved(owner)
        if value is not None:
            found.add(home_of(value, name))
    return found


def _resolved(full_name):
    """The module or class of this name; None if there is none."""
    outer, _, name = full_name.rpartition(".")
    try:
        return import_module(full_name)
    except ImportError:
        return getattr(_resolved(outer), name, None) if outer else None


def problems_of(objects, package=PACKAGE, public=PUBLIC, internal=INTERNAL):
    """What is wrong with a reference of these objects, a sentence each."""
    names, problems = public_names(package, public, internal)
    documented = documented_names(objects)
    for name, text in names.items():
        if not text:
            problems.append(f"{name} is public, but has no docstring")
        if name not in documented:
            problems.append(f"{name} is public, but not in the reference")
    hidden = {f"{package}.{name}" for name in internal} & documented
    problems += [f"{name} is internal, but in the reference" for name in sorted(hidden)]
    return problems


def check(app, exception):
    """Warn of each problem, once all pages are read."""
    if exception is None:
        for problem in problems_of(app.env.get_domain("py").objects):
            logging.getLogger(__name__).warning("%s (see docs/public_names.py)", problem)


def link_names(app, what, name, obj, options, lines):
    """Make links of the public names that a docstring has in backticks.

    These are functions, classes and constants, "Class.member", and members of the docstring's own
    class; not arguments.
    """
    names = [full_name.split(".", 3)[-1] for full_name in app.public_names]
    times, last = Counter(names), Counter(full_name.rpartition(".")[2] for full_name in names)
    targets = {n: f".{n}" for n in names if times[n] == 1 and ("." in n or last[n] == 1)}
    targets |= {n: f"{PACKAGE}.{n}" for n in import_module(PACKAGE).__all__ if n in times}
    owner = name if inspect.isclass(obj) else name.rpartition(".")[0]
    if inspect.isclass(value := _resolved(owner)):
        own = f"{value.__qualname__}."
        targets |= {
            n.removeprefix(own): f"{owner}.{n.removeprefix(own)}"
            for n in names
            if n.startswith(own)
        }
    with contextlib.suppress(TypeError, ValueError):  # nothing that is called
        for argument in inspect.signature(obj).parameters:
            targets.pop(argument, None)

    def link(found):
        name = found[1]  # with or without the module before it
        while "." in name and name not in targets:
            name = name.partition(".")[2]
        return f":py:obj:`{found[1]} <{targets[name]}>`" if name in targets else found[0]

    lines[:] = [re.sub(r"(?<![`:\w])`([\w.]+)`(?![`\w])", link, line) for line in lines]


def setup(app):
    """Called by Sphinx."""
    app.public_names, _ = public_names(PACKAGE, PUBLIC, INTERNAL)
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", link_names)
    app.connect("build-finished", check)
