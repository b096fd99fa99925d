"""The drawing of a recipe: a panel for each task, then its parts with what every phase trains.

A task reads from below: fields of a sample, the part that encodes them, tokens, the network with a lane for each expert, and above it
what is predicted. Beside it stands the attention mask of that very example, a row for each token that looks and a column for each token
it may look at. Nothing here decides anything; it lays out what `example` and `anatomy` found.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from stages.anatomy import Part, count_words, learns, model_size, parts_of, weights_of
from stages.drawing.example import DrawnSegment, Example, by_block, examples_of
from stages.drawing.svg import (
    EXPERT_COLOURS,
    MONO_WIDTH,
    PORT_COLOURS,
    STYLE,
    Font,
    el,
    flame,
    group,
    moved,
    number,
    path,
    rect,
    snowflake,
    text,
    up,
    width_of,
    wrap,
)
from stages.escape import Markup
from stages.model import covers
from stages.parts.objectives import ContrastiveConfig
from stages.recipe import Phase, Recipe

WIDTH, MARGIN, INSET = 1200, 28, 26
INNER = WIDTH - 2 * MARGIN - 2 * INSET  # what a panel has for its content
PILL, CELL, STEP = 24.0, 15.0, 17.0  # a text token's height, a picture token's side, and its pitch
GAP, BLOCK_GAP = 9.0, 20.0
BOX_PITCH = 34.0  # from the top of an encoder or connector to the top of the next
MATRIX_SIDE, MATRIX_CELL = 400.0, (7.0, 13.0)  # of a whole mask, and of one cell at least and at most

Drawn = tuple[list[Markup], float]  # elements, and the height they take


@dataclass(frozen=True)
class Figure:
    """What every panel needs to know of the recipe."""

    recipe: Recipe
    parts: list[Part]
    weights: dict[str, int]
    prefix: str

    def port_colour(self, port: str) -> str:
        return f"p{list(self.recipe.ports).index(port) % PORT_COLOURS}"

    def expert_colour(self, expert: str) -> str:
        return f"e{(self.experts.index(expert) if expert else 0) % EXPERT_COLOURS}"

    def experts_of(self, network: str) -> list[str]:
        """Names of one network's experts; empty where there is only one."""
        found = next((own.experts for name, own in self.recipe.backbones.items() if network in ("", name)), ())
        return list(found) if len(found) > 1 else []

    @property
    def experts(self) -> list[str]:
        """Names of all experts of all networks; empty where there is only one."""
        return [name for network in self.recipe.backbones.values() if len(network.experts) > 1 for name in network.experts]

    def phase_of(self, task: str) -> Phase | None:
        """The last phase that trains a task."""
        return next((phase for phase in reversed(self.recipe.phases) if task in phase.tasks), None)

    def share(self, address: str, phase: Phase) -> float | None:
        """Which share of a part's weights learns in a phase; None where it has none."""
        own = {name: count for name, count in self.weights.items() if covers(address, name)}
        return sum(count for name, count in own.items() if learns(phase, name)) / sum(own.values()) if own else None

    def mark(self, address: str, phase: Phase | None, x: float, y: float) -> Markup:
        """A flame or a snowflake at (x, y), or nothing for what has no weights."""
        share = self.share(address, phase) if phase is not None else None
        return Markup() if share is None else flame(x, y) if share else snowflake(x, y)


def draw_recipe(recipe: Recipe) -> Markup:
    """The whole drawing as one SVG element of 1200 units width."""
    weights = weights_of(recipe)
    prefix = "mmd-" + hashlib.sha256(recipe.to_toml().encode()).hexdigest()[:8]
    figure = Figure(recipe, parts_of(recipe, weights), weights, prefix)
    examples = examples_of(recipe)
    content, y = header(figure, examples)
    for example in examples:
        drawn, height = task_panel(figure, example)
        content.append(moved(drawn, MARGIN, y))
        y += height + 18
    drawn, height = parts_panel(figure)
    content.append(moved(drawn, MARGIN, y))
    y += height + MARGIN
    told = f"{recipe.name}: tasks {', '.join(recipe.tasks) or 'none'}; parts {', '.join(part.address for part in figure.parts)}"
    return el(
        "svg",
        [
            el("title", f"The recipe {recipe.name}"), el("desc", told), el("style", Markup(STYLE)), el("defs", grain(figure)),
            rect(0, 0, WIDTH, y, "paper"), *content,
        ],
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {number(y)}", role="img", class_="mmd",
    )  # fmt: skip


def grain(figure: Figure) -> list[Markup]:
    """A dotted fill in the colour of each port that denoises."""
    dots = ((1.5, 1.6, 0.9), (4.4, 3.4, 0.8), (2.4, 5.0, 0.7), (5.6, 0.6, 0.6), (0.4, 3.6, 0.6))
    return [
        el(
            "pattern",
            group([el("circle", cx=x, cy=y, r=r, class_="mmd-grain") for x, y, r in dots], class_=f"mmd-{figure.port_colour(name)}"),
            id=f"{figure.prefix}-{list(figure.recipe.ports).index(name)}", width=6, height=6, patternUnits="userSpaceOnUse",
        )
        for name, port in figure.recipe.ports.items()
        if port.objective is not None and port.objective.kind == "denoise"
    ]  # fmt: skip


# --- header -----------------------------------------------------------------------------------------------------------------------


def header(figure: Figure, examples: Sequence[Example]) -> Drawn:
    """Name, paper and sizes, then how to read what follows."""
    recipe, paper = figure.recipe, figure.recipe.paper
    y = 58.0
    content = [text(MARGIN, y, recipe.name, "bold", 32)]
    for line in wrap(f"{paper.title} (arXiv:{paper.arxiv})" if paper.title else f"arXiv:{paper.arxiv}", WIDTH - 2 * MARGIN, 15):
        y += 24
        content.append(text(MARGIN, y, line, "soft", 15))
    size = model_size(recipe)
    facts = [f"size {recipe.size}" + (f", {count_words(size)} parameters" if size else "")]
    if paper.parameters:
        facts.append(f"published {count_words(paper.parameters)}")
    elif paper.nominal:
        facts.append(f"published as {paper.nominal}")
    if recipe.scope:
        facts.append(f"scope {recipe.scope}")
    y += 22
    content.append(text(MARGIN, y, " · ".join(facts), "soft", 13))
    legend, height = legend_rows(figure, examples)
    content.append(moved(legend, MARGIN, y + 16))
    return content, y + 16 + height + 14


def legend_rows(figure: Figure, examples: Sequence[Example]) -> Drawn:
    """The signs that occur in this drawing, wrapped into lines."""
    table = any(example.length for example in examples)
    kinds = {drawn.objective for example in examples for drawn in example.segments if drawn.objective}
    first = next((name for name, port in figure.recipe.ports.items() if port.objective is not None), next(iter(figure.recipe.ports), ""))
    tone = figure.port_colour(first) if first else "p0"

    def toned(kind: str, *, fill: str = "") -> Markup:
        return el("rect", x=0, y=0, width=14, height=14, rx=3, class_=f"mmd-{kind} mmd-{tone}", fill=fill)

    entries: list[tuple[list[Markup], float, str]] = []
    if examples:
        entries.append(([toned("given")], 14, "given"))
    if kinds & {"next-token", "next-feature"}:
        entries.append(([chevron(4, 7, tone), rect(10, 0, 14, 14, f"predicted {tone}", 3)], 24, "predicted from the token before it"))
    if kinds & {"masked-token", "masked-denoise"}:
        mark = moved([text(7, 11, "?", "mid bold tone", 10)], 0, 0, tone)
        entries.append(([toned("hidden"), mark], 14, "hidden, predicted in place"))
    if "denoise" in kinds:
        port = next(name for name, port in figure.recipe.ports.items() if port.objective is not None and port.objective.kind == "denoise")
        index = list(figure.recipe.ports).index(port)
        noisy = el(
            "rect", width=14, height=14, rx=3, class_=f"mmd-noisy mmd-p{index % PORT_COLOURS}", fill=f"url(#{figure.prefix}-{index})"
        )
        entries.append(([noisy], 14, "noised, predicted in place"))
    if table:
        entries.append(([rect(0, 0, 14, 14, f"own {tone}")], 14, "may attend, within the block"))
        entries.append(([rect(0, 0, 14, 14, f"earlier {tone}")], 14, "may attend, to an earlier block"))
    if any(part.parameters for part in figure.parts):
        entries.append(([flame(0, 0, 15)], 15, "learns"))
        entries.append(([snowflake(0, 0, 15)], 15, "frozen"))
    content, x, y = [], 0.0, 0.0
    for sign, width, words in entries:
        needed = width + 7 + width_of(words, 12)
        if x and x + needed > WIDTH - 2 * MARGIN:
            x, y = 0.0, y + 24
        content += [moved(sign, x, y), text(x + width + 7, y + 11.5, words, "soft", 12)]
        x += needed + 16
    return content, y + 16 if entries else 0.0


def chevron(x: float, y: float, tone: str) -> Markup:
    """ "The token on the left predicts the one on the right"; centred at (x, y)."""
    return path(f"M{number(x - 1.8)} {number(y - 4)}l3.6 4l-3.6 4", f"chevron {tone}")


# --- a task -----------------------------------------------------------------------------------------------------------------------


def task_panel(figure: Figure, example: Example) -> Drawn:
    """The flow with the table of segments below it on the left, the mask on the right, as far up as there is room for it."""
    phase = figure.phase_of(example.task)
    content = [text(INSET, 34, example.title, "bold", 18)]
    content.append(text(INSET + width_of(example.title, 18, "bold") + 12, 34, task_words(figure, example), "soft", 12.5))
    lines = columns_of(example, [width_of_column(figure, drawn) for drawn in example.segments], INNER - lane_words(figure, example))
    y = top = 56.0
    for line in lines:
        drawn, height = flow_line(figure, example, line, phase)
        content.append(moved(drawn, INSET, y))
        y += height + 14
    if example.length:
        mask, mask_width, mask_height = mask_grid(figure, example)
        room = INNER - mask_width - 28
        together = table_width(figure, example) <= room
        table, table_height = segment_table(figure, example, room if together else INNER)
        content.append(moved(table, INSET, y + 8))
        if together and max(map(line_width, lines)) + lane_words(figure, example) <= room:
            mask_top = top
        else:
            mask_top = y + 8 + (0 if together else table_height + 26)
        content.append(moved(mask, INSET + (INNER - mask_width if together else 0), mask_top))
        y = max(y + 8 + table_height, mask_top + mask_height)
    return [rect(0, 0, WIDTH - 2 * MARGIN, y + 22, "card", 12), *content], y + 22


def task_words(figure: Figure, example: Example) -> str:
    """Where and how much a task is trained, and from which phase the marks are."""
    phases = [phase for phase in figure.recipe.phases if example.task in phase.tasks]
    trained = ", ".join(f"weight {phase.tasks[example.task]:g} in phase {phase.name}" for phase in phases) or "trained in no phase"
    marks = f"; marks are those of {phases[-1].name}" if len(figure.recipe.phases) > 1 and phases else ""
    return f"task, {trained}{marks}" + (f"; {example.length} tokens in this example" if example.length else "")


@dataclass(frozen=True)
class Column:
    """A segment (or as many of its tokens as fit a line) in the flow, with the width it needs."""

    drawn: DrawnSegment
    begin: int
    end: int
    width: float
    new_block: bool
    ends_block: bool


def columns_of(example: Example, least: Sequence[float], limit: float) -> list[list[Column]]:
    """Lines of columns: blocks side by side, a new line at `limit`. least: what the words around each segment need."""
    lines: list[list[Column]] = [[]]
    x = 0.0
    needs = iter(least)
    for block in by_block(example.segments):
        own = [next(needs) for _ in block]
        whole = sum(max(cells_width(drawn, 0, len(drawn.labels)), words) + GAP for drawn, words in zip(block, own, strict=True))
        if lines[-1] and x + BLOCK_GAP + whole > limit >= whole:
            lines.append([])
            x = 0.0
        for drawn, words in zip(block, own, strict=True):
            for begin, end in pieces(drawn, limit):
                width = max(cells_width(drawn, begin, end), words)
                first, last = drawn is block[0] and begin == 0, drawn is block[-1] and end == len(drawn.labels)
                gap = (BLOCK_GAP if first else GAP) if lines[-1] else 0.0
                if lines[-1] and x + gap + width > limit:
                    lines.append([])
                    x, gap = 0.0, 0.0
                lines[-1].append(Column(drawn, begin, end, width, first or not lines[-1], last))
                x += gap + width
    return lines


def line_width(line: Sequence[Column]) -> float:
    gaps = sum(BLOCK_GAP if column.new_block else GAP for column in line[1:])
    return sum(column.width for column in line) + gaps


def pieces(drawn: DrawnSegment, limit: float) -> list[tuple[int, int]]:
    """Token ranges of a segment that fit a line; a picture is one."""
    if not any(drawn.labels):
        return [(0, len(drawn.labels))]
    cuts, used = [0], 0.0
    for place, label in enumerate(drawn.labels):
        needed = pill_width(label) + GAP
        if used and used + needed > limit:
            cuts.append(place)
            used = 0.0
        used += needed
    return list(zip(cuts, [*cuts[1:], len(drawn.labels)], strict=True))


def pill_width(label: str) -> float:
    return max(16.0, len(label) * 11 * MONO_WIDTH + 10)


def picture_columns(drawn: DrawnSegment) -> int:
    """A picture keeps its columns; features without a grid are folded to about a square."""
    grid = drawn.segment.grid
    return grid[-1] if len(grid) > 1 else math.ceil(math.sqrt(len(drawn.labels)))


def cells_width(drawn: DrawnSegment, begin: int, end: int) -> float:
    if not any(drawn.labels):
        return picture_columns(drawn) * STEP - (STEP - CELL)
    labels = drawn.labels[begin:end]
    return sum(map(pill_width, labels)) + GAP * (len(labels) - 1) + (GAP if any(drawn.supervised[begin : begin + 1]) else 0)


def cells_height(drawn: DrawnSegment) -> float:
    if any(drawn.labels):
        return PILL
    return math.ceil(len(drawn.labels) / picture_columns(drawn)) * STEP - (STEP - CELL)


def boxes_of(figure: Figure, drawn: DrawnSegment) -> list[tuple[str, str]]:
    """(address, words) of the parts a segment's content passes before it is tokens, the last one first: the connector, and the encoder or
    autoencoder. Ids need neither: a text tokenizer is not drawn, and an embedding is a table."""
    port = figure.recipe.ports[drawn.port]
    if not port.is_ids and any(drawn.labels):
        return [(f"ports.{drawn.port}.timestep", "embedding of the time")]
    boxes = []
    if port.connector is not None and not port.is_ids:
        pooled = f" of {port.select}" if port.select != "tokens" else ""
        boxes.append((f"ports.{drawn.port}.connector", port.connector.kind + pooled))
    if port.encoder:
        boxes.append((f"encoders.{port.encoder}", kind_at(figure, f"encoders.{port.encoder}")))
    elif port.autoencoder:
        boxes.append((f"autoencoders.{port.autoencoder}", kind_at(figure, f"autoencoders.{port.autoencoder}")))
    return boxes


def kind_at(figure: Figure, address: str) -> str:
    return next(part.kind for part in figure.parts if part.address == address)


def box_width(words: str) -> float:
    return width_of(words, 11) + 36


def width_of_column(figure: Figure, drawn: DrawnSegment) -> float:
    """What the words above and below a segment need."""
    return max(
        width_of(drawn.port, 12, "bold"),
        width_of(drawn.origin, 12),
        width_of(drawn.objective, 11) + 16 if drawn.objective and any(drawn.supervised) else 0,
        *(box_width(words) for _, words in boxes_of(figure, drawn)),
        width_of(str(drawn.segment.mask), 11) if drawn.in_table else 0,
    )


def flow_line(figure: Figure, example: Example, line: Sequence[Column], phase: Phase | None) -> Drawn:
    """From below: fields, source, tokens, the network's lanes, predictions."""
    inside = [column for column in line if column.drawn.in_table]
    lanes = max(1, len(figure.experts_of(example.network)))
    tallest = max(cells_height(column.drawn) for column in line)
    deepest = max(len(boxes_of(figure, column.drawn)) for column in line)
    predicts = any(any(column.drawn.supervised[column.begin : column.end]) for column in line)
    y_goal = 0.0
    y_lane = 34.0 if predicts else 0.0
    lane_height = 20.0 if lanes > 1 else 26.0
    y_cells = y_lane + lanes * lane_height + 14 if inside else 0.0
    y_port = y_cells + tallest + 16
    y_bracket = y_port + BOX_PITCH * deepest + 30
    height = y_bracket + (20 if inside else 0)
    content: list[Markup] = []
    spots: list[tuple[Column, float]] = []
    x = 0.0
    for place, column in enumerate(line):
        x += 0.0 if not place else BLOCK_GAP if column.new_block else GAP
        spots.append((column, x))
        x += column.width
    if not inside:
        return tower_line(figure, example, spots, tallest, phase)
    content += lanes_drawn(figure, example, spots, y_lane, lane_height, phase)
    for column, left in spots:
        drawn, tone, middle = column.drawn, figure.port_colour(column.drawn.port), left + column.width / 2
        cells = cells_drawn(figure, drawn, column.begin, column.end)
        own_height = cells_height(drawn)
        top = y_cells + (tallest - own_height) / 2
        content.append(moved(cells, left + (column.width - cells_width(drawn, column.begin, column.end)) / 2, top, tone))
        if drawn.in_table:
            content.append(up(middle, top - 2, y_lane + lanes * lane_height + 1))
        judged = any(drawn.supervised[column.begin : column.end])
        if judged:
            w = width_of(drawn.objective, 11) + 16
            goal = [rect(middle - w / 2, y_goal, w, 20, "goal", 10), text(middle, y_goal + 14, drawn.objective, "mid tone", 11)]
            content += [moved(goal, 0, 0, tone), up(middle, y_lane - 1, y_goal + 21)]
        content.append(moved([text(middle, y_port, drawn.port, "mid bold tone", 12)], 0, 0, tone))
        stack, used = box_stack(figure, drawn, middle, y_port + 6, phase)
        content += stack
        if drawn.origin:
            content.append(text(middle, y_port + used + 17, drawn.origin, "mid soft", 12))
    content += brackets(spots, y_bracket)
    return content, height


def box_stack(figure: Figure, drawn: DrawnSegment, middle: float, y: float, phase: Phase | None) -> Drawn:
    """The parts of `boxes_of` under each other with their marks, an arrow into each from below; (middle, y) is the top centre."""
    content = []
    boxes = boxes_of(figure, drawn)
    for place, (address, words) in enumerate(boxes):
        w, top = box_width(words), y + place * BOX_PITCH
        content += [
            rect(middle - w / 2, top, w, 22, "box", 6),
            text(middle - w / 2 + 11, top + 15, words, "", 11),
            figure.mark(address, phase, middle + w / 2 - 20, top + 4.5),
        ]
        if place + 1 < len(boxes):
            content.append(up(middle, top + BOX_PITCH - 1, top + 23))
    return content, BOX_PITCH * len(boxes)


def lane_words(figure: Figure, example: Example) -> float:
    """What the names of the experts need beside their lanes."""
    experts = figure.experts_of(example.network) if example.length else []
    return max([0.0, *(width_of(f"expert {expert}", 11.5) + 38 for expert in experts)])


def lanes_drawn(
    figure: Figure, example: Example, spots: Sequence[tuple[Column, float]], y: float, height: float, phase: Phase | None
) -> list[Markup]:
    """The network over its segments: one bar, or a lane for each expert, busy where its tokens are."""
    inside = [(column, left) for column, left in spots if column.drawn.in_table]
    begin, end = inside[0][1], inside[-1][1] + inside[-1][0].width
    network = example.network or next(iter(figure.recipe.backbones))
    experts = figure.experts_of(network)
    if not experts:
        address = f"backbones.{network}"
        words = f"{kind_at(figure, address)} {network}"
        w = width_of(words, 12) + 22
        middle = max((begin + end) / 2, begin + w / 2)
        return [
            rect(begin, y, max(end - begin, w), height, "lane e0", 7),
            text(middle - 9, y + height / 2 + 4.2, words, "mid", 12),
            figure.mark(address, phase, middle + width_of(words, 12) / 2 - 4, y + height / 2 - 6.5),
        ]
    content = []
    for lane, expert in enumerate(experts):
        top, tone = y + lane * height, figure.expert_colour(expert)
        content.append(rect(begin, top + 1, end - begin, height - 2, f"lane {tone}", 5))
        for column, left in inside:
            if column.drawn.expert == expert:
                content.append(rect(left, top + 1, column.width, height - 2, f"busy {tone}", 5))
        words = f"expert {expert}"
        content.append(text(end + 12, top + height / 2 + 4, words, "", 11.5))
        address = f"backbones.{network}.experts.{expert}"
        content.append(figure.mark(address, phase, end + 20 + width_of(words, 11.5), top + height / 2 - 6.5))
    return content


def cells_drawn(figure: Figure, drawn: DrawnSegment, begin: int, end: int) -> list[Markup]:
    """The tokens of a segment from (0, 0): words in pills, a picture as its grid."""
    noise = f"url(#{figure.prefix}-{list(figure.recipe.ports).index(drawn.port)})"
    tone = figure.port_colour(drawn.port)

    def style(token: int) -> str:
        if not any(drawn.supervised[token : token + 1]):
            return "given"
        return {"masked-token": "hidden", "masked-denoise": "hidden", "denoise": "noisy"}.get(drawn.objective, "predicted")

    content, x = [], 0.0
    if not any(drawn.labels):
        columns = picture_columns(drawn)
        for token in range(begin, end):
            row, column = divmod(token, columns)
            kind = style(token)
            left, top = column * STEP, row * STEP
            content.append(
                el("rect", x=left, y=top, width=CELL, height=CELL, rx=3, class_=f"mmd-{kind}", fill=noise if kind == "noisy" else "")
            )
            if kind == "hidden":
                content.append(text(left + CELL / 2, top + 11.5, "?", "mid bold tone", 10))
        return content
    for token in range(begin, end):
        kind = style(token)
        w = pill_width(drawn.labels[token])
        if kind == "predicted":
            if token == begin:
                x += GAP
            content.append(chevron(x - GAP / 2, PILL / 2, tone))
        content.append(rect(x, 0, w, PILL, kind, 6))
        label = "?" if kind == "hidden" else drawn.labels[token]
        content.append(text(x + w / 2, 16, label, "mid mono on" if kind == "predicted" else "mid mono", 11))
        x += w + GAP
    return content


def brackets(spots: Sequence[tuple[Column, float]], y: float) -> list[Markup]:
    """A line under each attention block, named by its mask kind."""
    content: list[Markup] = []
    run: list[tuple[Column, float]] = []
    for place, (column, left) in enumerate(spots):
        if not column.drawn.in_table:
            continue
        run.append((column, left))
        last = place + 1 == len(spots) or spots[place + 1][0].new_block
        if not last:
            continue
        begin, end = run[0][1], run[-1][1] + run[-1][0].width
        opening = "" if run[0][0].begin else "v-4m0 4"
        content.append(path(f"M{number(begin)} {number(y)}{opening}H{number(end)}{'v-4' if column.ends_block else ''}", "bracket"))
        content.append(text((begin + end) / 2, y + 14, str(column.drawn.segment.mask), "mid soft", 11))
        run = []
    return content


def tower_line(figure: Figure, example: Example, spots: Sequence[tuple[Column, float]], tallest: float, phase: Phase | None) -> Drawn:
    """Segments outside any sequence: each through its own part, then the objective that compares or judges them."""
    recipe = figure.recipe
    content: list[Markup] = []
    objectives = [name for name in example.objectives if name in recipe.objectives]
    words = [f"{name}: {objective_words(recipe, name)}" for name in objectives]
    span = max([spots[-1][1] + spots[-1][0].width, *(width_of(line, 12) + 52 for line in words), 260.0])
    stretch = (span - spots[-1][1] - spots[-1][0].width) / max(1, 2 * len(spots))
    y = 0.0
    for name, line in zip(objectives, words, strict=True):
        content += [
            rect(0, y, span, 28, "lane e1", 7),
            text(14, y + 18.5, line, "", 12),
            figure.mark(f"objectives.{name}", phase, span - 24, y + 7.5),
        ]
        y += 34
    deepest = max(len(boxes_of(figure, column.drawn)) for column, _ in spots)
    y_cells = y + 12 + BOX_PITCH * deepest
    for place, (column, left) in enumerate(spots):
        drawn, tone = column.drawn, figure.port_colour(column.drawn.port)
        middle = left + column.width / 2 + stretch * (2 * place + 1)
        stack, used = box_stack(figure, drawn, middle, y + 8, phase)
        top = y_cells + (tallest - cells_height(drawn)) / 2
        content += [up(middle, y + 7, y - 5), *stack, up(middle, top - 2, y + used - 3)]
        cells = cells_drawn(figure, drawn, column.begin, column.end)
        content.append(moved(cells, middle - cells_width(drawn, column.begin, column.end) / 2, top, tone))
        content.append(moved([text(middle, y_cells + tallest + 18, drawn.port, "mid bold tone", 12)], 0, 0, tone))
        content.append(text(middle, y_cells + tallest + 35, ", ".join(drawn.fields), "mid soft", 12))
    height = y_cells + tallest + 38
    compared = [recipe.objectives[name] for name in objectives if isinstance(recipe.objectives[name], ContrastiveConfig)]
    if compared and len(spots) > 1:
        content += pairs_drawn(figure, spots, min(span + 70, INNER - 330), height)
    return content, height


def objective_words(recipe: Recipe, name: str) -> str:
    """An objective's kind, with the terms or the normalisation it names."""
    config = recipe.objectives[name]
    if isinstance(config, ContrastiveConfig):
        return f"{config.kind}, {config.normalise} over the batch"
    terms = getattr(config, "terms", None)
    held = (
        ", ".join(f"{key} {value:g}" for key, value in terms.model_dump().items() if value and key in terms.model_fields_set)
        if terms is not None
        else ""
    )
    return f"{config.kind}" + (f" ({held})" if held else "")


def pairs_drawn(figure: Figure, spots: Sequence[tuple[Column, float]], x: float, height: float) -> list[Markup]:
    """What a contrastive objective compares: every row of one side with every row of the other; pairs lie on the diagonal."""
    size, n = 22.0, 5
    first, second = (spots[place][0].drawn.port for place in (0, 1))
    tone = figure.port_colour(first)
    content = []
    for row in range(n):
        for column in range(n):
            kind = "predicted" if row == column else "given"
            content.append(rect(column * (size + 3), row * (size + 3), size, size, f"{kind} {tone}", 4))
    side = n * (size + 3)
    words = [f"{first} (rows) with {second} (columns)", "of every sample in the batch;", "the diagonal holds the pairs"]
    content += [text(side + 16, 20 + 19 * line, entry, "soft", 12) for line, entry in enumerate(words)]
    return [moved(content, x, max(0.0, (height - side) / 2 - 16))]


# --- mask and table ---------------------------------------------------------------------------------------------------------------


def mask_grid(figure: Figure, example: Example) -> tuple[list[Markup], float, float]:
    """May_attend of the example: rows look, columns are looked at. Returns elements, width and height.

    Cells are drawn in units of one token (a run of visible cells is one rectangle of a path), so the file holds the mask exactly.
    """
    n = example.length
    cell = max(MATRIX_CELL[0], min(MATRIX_CELL[1], MATRIX_SIDE / n))
    font = min(11.0, cell - 1.5)
    labels = [label for drawn in example.segments if drawn.in_table for label in row_labels(drawn)]
    left = max([0.0, *(width_of(label, font, "mono") for label in labels)]) + 18 if font >= 8 else 18.0
    top = 34.0
    owner = [drawn for drawn in example.segments if drawn.in_table for _ in drawn.labels]
    runs: dict[tuple[str, str], list[str]] = {}
    for q in range(n):
        k = 0
        while k < n:
            if not example.mask[q][k]:
                k += 1
                continue
            start, drawn = k, owner[k]
            while k < n and example.mask[q][k] and owner[k] is drawn:
                k += 1
            kind = "own" if drawn.block == owner[q].block else "earlier"
            runs.setdefault((kind, figure.port_colour(drawn.port)), []).append(f"M{start} {q}h{k - start}v1h{start - k}z")
    cells = [path("".join(shapes), f"{kind} {tone}") for (kind, tone), shapes in runs.items()]
    mesh = path("".join(f"M0 {i}H{n}M{i} 0V{n}" for i in range(1, n)), "mesh", vector_effect="non-scaling-stroke", stroke_width=1)
    cuts = [block[0].start for block in by_block([d for d in example.segments if d.in_table])][1:]
    lines = path("".join(f"M0 {i}H{n}M{i} 0V{n}" for i in cuts) or "M0 0", "cut", vector_effect="non-scaling-stroke", stroke_width=1)
    frame = el("rect", width=n, height=n, class_="mmd-wash")
    grid = group(
        [frame, *cells, mesh, lines],
        transform=f"translate({number(left)} {number(top)}) scale({number(cell)})", data_task=example.title, data_length=n,
    )  # fmt: skip
    title, legend = "who may attend to whom", "rows look at columns"
    title_width = width_of(title, 12, "bold") + 8
    content = [grid, text(left, 12, title, "bold", 12), text(left + title_width, 12, legend, "soft", 12)]
    for drawn in example.segments:
        if not drawn.in_table:
            continue
        tone, length = figure.port_colour(drawn.port), len(drawn.labels) * cell
        at = drawn.start * cell
        content.append(rect(left + at + 0.75, top - 10, length - 1.5, 6, f"predicted {tone}" if drawn.is_target else f"given {tone}", 1.5))
        content.append(rect(left - 10, top + at + 0.75, 6, length - 1.5, f"predicted {tone}" if drawn.is_target else f"given {tone}", 1.5))
        if font < 8:
            continue
        if any(drawn.labels):
            for place, label in enumerate(drawn.labels):
                y = top + at + (place + 0.5) * cell + font * 0.36
                content.append(text(left - 15, y, label, "end mono soft", font))
        else:
            words = row_labels(drawn)[0]
            content.append(text(left - 15, top + at + length / 2 + 4, words, "end soft", 11))
    return content, left + max(n * cell, title_width + width_of(legend, 12)), top + n * cell


def row_labels(drawn: DrawnSegment) -> list[str]:
    """What stands beside the rows of a segment: its words, or its port once."""
    return list(drawn.labels) if any(drawn.labels) else [drawn.port]


def table_of(figure: Figure, example: Example) -> tuple[list[DrawnSegment], list[list[str]], list[float]]:
    """Segments, their rows with the heading first, and what each column needs at least."""
    inside = [drawn for drawn in example.segments if drawn.in_table]
    rows = [["port", "content", "tokens", "role", "mask", "positions", *(["expert"] if figure.experts else [])]]
    for drawn in inside:
        grid = drawn.segment.grid
        rows.append(
            [
                drawn.port,
                drawn.segment.field or drawn.origin,
                f"{len(drawn.labels)}" + (f" ({' x '.join(map(str, grid))})" if len(grid) > 1 else ""),
                drawn.objective or ("predicted" if drawn.is_target else "given"),
                str(drawn.segment.mask),
                drawn.clock,
                *([drawn.expert] if figure.experts else []),
            ]
        )
    fonts: list[Font] = ["bold", "mono", "sans", "sans", "sans", "sans", "sans"]
    needed = [max(width_of(row[column], 11.5, fonts[column]) for row in rows) + 14 for column in range(len(rows[0]))]
    return inside, rows, needed


def table_width(figure: Figure, example: Example) -> float:
    """What the table of segments needs when long contents are folded."""
    needed = table_of(figure, example)[2]
    return sum(needed) - needed[1] + min(needed[1], 190.0)


def segment_table(figure: Figure, example: Example, width: float) -> Drawn:
    """A line for each segment: port, field, tokens, role, mask, positions, expert; what training does to it below."""
    inside, (heads, *rows), needed = table_of(figure, example)
    needed[1] = min(needed[1], width - sum(needed) + needed[1])
    starts = [sum(needed[:column]) for column in range(len(heads))]
    content = [text(starts[column], 12, head, "soft", 11.5) for column, head in enumerate(heads)]
    y = 20.0
    for drawn, row in zip(inside, rows, strict=True):
        content.append(path(f"M0 {number(y)}H{number(width)}", "line"))
        folded = wrap(row[1], needed[1] - 12, 11.5, "mono")
        words = [text(starts[column], y + 16, entry, cell_kind(drawn, column), 11.5) for column, entry in enumerate(row) if column != 1]
        words += [text(starts[1], y + 16 + 15 * line, entry, "mono", 11.5) for line, entry in enumerate(folded)]
        content.append(group(words, class_=f"mmd-{figure.port_colour(drawn.port)}"))
        y += 23 + 15 * (len(folded) - 1)
        for note in notes_of(figure, drawn):
            content.append(text(starts[1], y + 10, note, "soft", 11))
            y += 17
    return content, y


def cell_kind(drawn: DrawnSegment, column: int) -> str:
    """The port and what is predicted are in the port's colour."""
    return "bold tone" if column == 0 else "tone" if column == 3 and drawn.is_target else ""


def notes_of(figure: Figure, drawn: DrawnSegment) -> list[str]:
    """What training does to a segment beyond its row of the table."""
    notes = []
    if drawn.cond_dropout_prob:
        notes.append(f"left out of {drawn.cond_dropout_prob:.0%} of the samples, as the condition “{drawn.segment.group}”")
    if drawn.segment.weight != 1.0:
        notes.append(f"loss weight {drawn.segment.weight:g}")
    if drawn.segment.timestep_range != (0.0, 1.0):
        low, high = drawn.segment.timestep_range
        notes.append(f"noise levels {low:g} to {high:g}")
    if drawn.segment.mask.is_isolated:
        notes.append("no later block sees it")
    if hidden := figure.recipe.ports[drawn.port].hidden_from:
        notes.append(f"hidden from {', '.join(hidden)}")
    return notes


# --- parts ------------------------------------------------------------------------------------------------------------------------


def parts_panel(figure: Figure) -> Drawn:
    """Every part with its size, and a column of marks for each phase."""
    phases = figure.recipe.phases
    phase_width = max([96.0, *(width_of(line, 11.5) + 16 for phase in phases for line in phase_words(phase))])
    addresses = max([120.0, *(width_of(part.address, 11.5, "mono") + 16 for part in figure.parts)])
    kinds = max([60.0, *(width_of(part.kind, 12) + 18 for part in figure.parts)])
    sizes = max(150.0, INNER - addresses - kinds - 96 - phase_width * len(phases))
    starts = [0.0, addresses, addresses + kinds, addresses + kinds + sizes]
    x_phases = starts[3] + 96
    content = [text(INSET, 34, "Parts", "bold", 18)]
    y = 56.0
    for column, head in enumerate(["address", "kind", "sizes"]):
        content.append(text(INSET + starts[column], y + 10, head, "soft", 11.5))
    content.append(text(INSET + starts[3] + 72, y + 10, "parameters", "soft end", 11.5))
    tallest = 1
    for place, phase in enumerate(phases):
        left = INSET + x_phases + place * phase_width
        lines = phase_words(phase)
        tallest = max(tallest, len(lines))
        content += [text(left, y + 10 + 15 * line, words, "bold" if not line else "soft", 11.5) for line, words in enumerate(lines)]
    y += 10 + 15 * (tallest - 1) + 10
    for part in figure.parts:
        folded = wrap(part.sizes, sizes - 20, 12)
        content.append(path(f"M{INSET} {number(y)}H{number(INSET + INNER)}", "line"))
        family, _, name = part.address.partition(".")
        tone = figure.port_colour(name) if family == "ports" else ""
        content.append(moved([text(INSET, y + 18, part.address, "mono bold tone" if tone else "mono", 11.5)], 0, 0, tone or "plain"))
        content.append(text(INSET + starts[1], y + 18, part.kind, "", 12))
        content += [text(INSET + starts[2], y + 18 + 16 * line, words, "soft", 12) for line, words in enumerate(folded)]
        content.append(
            text(
                INSET + starts[3] + 72,
                y + 18,
                count_words(part.parameters) if part.parameters else "none",
                "end" if part.parameters else "end soft",
                12,
            )
        )
        for place, phase in enumerate(phases):
            content += phase_cell(part, phase, INSET + x_phases + place * phase_width, y)
        y += 27 + 16 * (len(folded) - 1)
    notes, height = differs(figure)
    content.append(moved(notes, INSET, y + 12))
    y += height
    return [rect(0, 0, WIDTH - 2 * MARGIN, y + 14, "card", 12), *content], y + 14


def phase_words(phase: Phase) -> list[str]:
    """What stands above a phase's column."""
    return [phase.name, phase.stage, f"{phase.steps:,} steps"]


def phase_cell(part: Part, phase: Phase, x: float, y: float) -> list[Markup]:
    """A flame, a snowflake, a share of a part, or nothing where the phase does not hold it."""
    if phase.name not in part.trained:
        return []
    trained = part.trained[phase.name]
    mark = group([flame(x, y + 6) if trained else snowflake(x, y + 6)], data_part=part.address, data_phase=phase.name, data_trained=trained)
    words = "learns" if trained == part.parameters else f"{trained / part.parameters:.0%} learns" if trained else "frozen"
    return [mark, text(x + 20, y + 18, words, "soft", 11.5)]


def differs(figure: Figure) -> Drawn:
    """What the recipe says it does otherwise than the paper."""
    lines = [line for entry in figure.recipe.paper.differs for line in hanging(entry)]
    if not lines:
        return [], 0.0
    content = [text(0, 16, "Differs from the paper", "bold", 12)]
    content += [text(14, 36 + 17 * place, line, "soft", 12) for place, line in enumerate(lines)]
    content += [text(0, 36 + 17 * place, "·", "soft", 12) for place, first in enumerate(first_lines(figure)) if first]
    return content, 36 + 17 * len(lines)


def hanging(entry: str) -> list[str]:
    return wrap(entry, INNER - 14, 12)


def first_lines(figure: Figure) -> list[bool]:
    return [not place for entry in figure.recipe.paper.differs for place, _ in enumerate(hanging(entry))]
