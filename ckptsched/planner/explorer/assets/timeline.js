// ---- timeline: bytes by role over the step, and below it which stage runs ----------------------

const MARGIN = { left: 64, right: 14, top: 22, axis: 22, lane: 64, gap: 10 };
const STACK = [KEPT, PARAMETERS, OUTPUT, STATE, TAPE, BUFFERS, RANDOM, GRADIENT, TRANSIENT];
const NARROWEST = 4; // operations that the view shows at least

/**
 * The picture. It knows operations and pixels; what is chosen is told by `onPoint` (looked at for a
 * moment, or -1) and `onPick`.
 */
function makeTimeline(chart, { onPoint, onPick }) {
  const [layers, cursor] = chart.querySelectorAll("canvas");
  const view = { from: 0, to: 1, bySeconds: false };
  let [step, plan, network, marked, shown] = [null, null, null, 0, 0];
  let [width, height] = [0, 0];

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const inner = () => width - MARGIN.left - MARGIN.right;
  const floor = () => height - MARGIN.lane - MARGIN.gap - MARGIN.axis;
  const end = () => (view.bySeconds ? step.start[step.m] : step.m);
  const begins = (p) => (view.bySeconds ? step.start[p] : p);
  const toX = (value) => MARGIN.left + ((value - view.from) / (view.to - view.from)) * inner();
  const toY = (size) => floor() - (size / top()) * (floor() - MARGIN.top);
  const top = () => 1.08 * Math.max(plan.budgetBytes, plan.peakBytes, step.measured ? plan.measured.peakBytes : 1);
  const tallest = (p) => Math.max(step.total[p], step.measured ? step.measured[p] : 0);

  /** The operation at a place of the axis: the last that begins there or before. */
  function operationAt(value) {
    if (!view.bySeconds) return Math.max(0, Math.min(step.m - 1, Math.floor(value)));
    let [low, high] = [0, step.m - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (step.start[middle] <= value) low = middle;
      else high = middle - 1;
    }
    while (low > 0 && step.seconds[low] === 0 && step.start[low] >= value) low--;
    return low;
  }

  const valueAt = (x) => view.from + ((x - MARGIN.left) / inner()) * (view.to - view.from);

  /** What of the view lies in each column of pixels: an operation, the largest of several. */
  function columns() {
    const [first, last] = [operationAt(view.from), operationAt(view.to)];
    const found = [];
    if (last - first < inner()) {
      for (let p = first; p <= last; p++) found.push([toX(begins(p)), toX(begins(p + 1)), p]);
    } else {
      let p = first;
      for (let x = MARGIN.left; x < MARGIN.left + inner() && p <= last; x++) {
        let best = p;
        while (p <= last && toX(begins(p)) < x + 1) {
          if (tallest(p) > tallest(best)) best = p;
          p++;
        }
        found.push([x, x + 1, best]);
      }
    }
    const [left, right] = [MARGIN.left, MARGIN.left + inner()];
    return found
      .map(([a, b, p]) => [Math.max(a, left), Math.min(b, right), p])
      .filter(([a, b]) => b > a);
  }

  function drawLayers() {
    const pen = fresh(layers);
    pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    drawGrid(pen);
    const parts = columns();
    const bottoms = new Float64Array(parts.length);
    for (const role of STACK) {
      if (!step.used.includes(role)) continue;
      pen.fillStyle = color(`--role-${role}`);
      parts.forEach(([a, b, p], k) => {
        const size = step.levels[role][p];
        if (size <= 0) return;
        const [low, high] = [toY(bottoms[k]), toY(bottoms[k] + size)];
        pen.fillRect(a, high, Math.max(b - a, 0.6), low - high);
        bottoms[k] += size;
      });
    }
    if (step.measured) drawMeasured(pen, parts);
    drawLines(pen);
    drawLane(pen);
  }

  /** What was measured, as a line over what is projected. */
  function drawMeasured(pen, parts) {
    pen.lineJoin = "round";
    const roomy = inner() > 5 * parts.length; // else a rim would hide what lies below
    for (const [ink, wide] of roomy ? [["--card", 3.6], ["--measured", 1.8]] : [["--measured", 1]]) {
      pen.strokeStyle = color(ink);
      pen.lineWidth = wide;
      pen.beginPath();
      parts.forEach(([a, b, p]) => {
        const y = toY(step.measured[p]);
        pen.lineTo(a, y);
        pen.lineTo(b, y);
      });
      pen.stroke();
    }
  }

  /** A canvas of the right size for this screen, empty. */
  function fresh(canvas) {
    const scale = window.devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    return pen;
  }

  function drawGrid(pen) {
    const [unit, scale] = unitFor(top());
    pen.lineWidth = 1;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (const value of ticks(top() / scale, 5)) {
      const y = Math.round(toY(value * scale)) + 0.5;
      pen.strokeStyle = color("--line");
      line(pen, MARGIN.left, y, width - MARGIN.right, y);
      pen.fillStyle = color("--quiet");
      pen.fillText(`${tickText(value)}${value ? ` ${unit}` : ""}`, MARGIN.left - 8, y);
    }
    pen.textAlign = "center";
    pen.textBaseline = "top";
    const span = view.to - view.from;
    const [timeUnit, timeScale] = view.bySeconds
      ? [["s", 1], ["ms", 1e-3], ["us", 1e-6], ["ns", 1e-9]].find(([, x]) => view.to >= x) || ["s", 1]
      : ["", 1];
    const width10 = ticks(span / timeScale, Math.max(2, Math.floor(inner() / 110)))[1];
    const begin = Math.ceil(view.from / timeScale / width10) * width10;
    for (let k = 0; ; k++) {
      const value = begin + k * width10;
      if (!(value * timeScale <= view.to)) break;
      const text = view.bySeconds ? `${tickText(value)} ${timeUnit}` : countText(Math.round(value));
      pen.fillText(text, Math.min(toX(value * timeScale), width - 24), floor() + 6);
    }
  }

  function line(pen, x0, y0, x1, y1) {
    pen.beginPath();
    pen.moveTo(x0, y0);
    pen.lineTo(x1, y1);
    pen.stroke();
  }

  /** The budget, the measured peak where there is one, and the peak. */
  function drawLines(pen) {
    const put = (size, text, dash, ink, right) => {
      const y = toY(size);
      pen.setLineDash(dash);
      pen.strokeStyle = pen.fillStyle = color(ink);
      pen.lineWidth = 1.4;
      line(pen, MARGIN.left, y, width - MARGIN.right, y);
      pen.setLineDash([]);
      pen.textAlign = right ? "right" : "left";
      pen.textBaseline = "bottom";
      pen.fillText(text, right ? width - MARGIN.right : MARGIN.left + 4, y - 3);
    };
    put(plan.budgetBytes, `budget ${bytesText(plan.budgetBytes, { budget: true })}`, [6, 4], "--ink", false);
    if (plan.measured) {
      put(plan.measured.peakBytes, `measured ${bytesText(plan.measured.peakBytes)}`, [2, 3], "--again", true);
    }
    const [p, y] = [plan.peakPosition, toY(plan.peakBytes)];
    const x = toX((begins(p) + begins(p + 1)) / 2);
    if (x >= MARGIN.left && x <= width - MARGIN.right) {
      pen.fillStyle = color("--ink");
      pen.strokeStyle = color("--card");
      pen.beginPath();
      pen.moveTo(x, y + 1);
      pen.lineTo(x - 5, y - 8);
      pen.lineTo(x + 5, y - 8);
      pen.closePath();
      pen.stroke();
      pen.fill();
    }
  }

  /** Which stage runs, the first at the top: runs forward, runs made again, backwards. */
  function drawLane(pen) {
    const [from, tall] = [height - MARGIN.lane, MARGIN.lane];
    pen.fillStyle = color("--soft");
    pen.fillRect(MARGIN.left, from, inner(), tall);
    pen.fillStyle = color("--quiet");
    pen.textAlign = "right";
    pen.textBaseline = "top";
    pen.fillText("stage 1", MARGIN.left - 8, from);
    pen.textBaseline = "bottom";
    pen.fillText(countText(network.count), MARGIN.left - 8, from + tall);
    const inks = [color("--once"), color("--again"), color("--back")];
    const unit = tall / network.count;
    const [first, last] = [operationAt(view.from), operationAt(view.to)];
    for (let p = first; p <= last; p++) {
      if (step.code[p] > BACKWARD || step.code[p] === TURN) continue;
      pen.fillStyle = inks[step.code[p] === BACKWARD ? 2 : step.again[p]];
      const x = Math.max(toX(begins(p)), MARGIN.left);
      const right = Math.min(toX(begins(p + 1)), MARGIN.left + inner());
      const y = from + (step.stage[p] - 1) * unit;
      if (right >= x) pen.fillRect(x, y, Math.max(right - x, 1), Math.max(unit, 1.5));
    }
  }

  function drawCursor() {
    const pen = fresh(cursor);
    const lane = height - MARGIN.lane;
    if (marked) {
      pen.fillStyle = color("--accent");
      const y = lane + ((marked - 0.5) / network.count) * MARGIN.lane;
      for (let p = operationAt(view.from); p <= operationAt(view.to); p++) {
        if (step.stage[p] !== marked || step.code[p] > BACKWARD) continue;
        const x = Math.min(Math.max(toX((begins(p) + begins(p + 1)) / 2), MARGIN.left), width - MARGIN.right);
        pen.beginPath();
        pen.arc(x, y, 3.5, 0, 7);
        pen.fill();
      }
    }
    const [a, b] = [toX(begins(shown)), toX(begins(shown + 1))];
    if (b < MARGIN.left - 1 || a > width - MARGIN.right + 1) return;
    const [left, right] = [Math.max(a, MARGIN.left), Math.min(b, width - MARGIN.right)];
    pen.fillStyle = color("--ink");
    pen.globalAlpha = 0.16;
    pen.fillRect(left, MARGIN.top - 8, Math.max(right - left, 1), height);
    pen.globalAlpha = 1;
    const x = (left + right) / 2;
    pen.strokeStyle = color("--ink");
    pen.lineWidth = 1;
    line(pen, x, MARGIN.top - 8, x, height);
    pen.fillStyle = color("--card");
    pen.beginPath();
    pen.arc(x, toY(step.total[shown]), 4, 0, 7);
    pen.fill();
    pen.stroke();
  }

  function draw() {
    if (!step) return;
    [width, height] = [chart.clientWidth, chart.clientHeight];
    if (width <= MARGIN.left + MARGIN.right) return;
    chart.dataset.view = `${view.from} ${view.to}`;
    drawLayers();
    drawCursor();
  }

  /** Show a part of the axis, as far as there is one. */
  function look(from, to) {
    const least = view.bySeconds ? end() / 1e6 : Math.min(NARROWEST, step.m);
    const span = Math.min(Math.max(to - from, least), end());
    view.from = Math.max(0, Math.min(from - (span - (to - from)) / 2, end() - span));
    view.to = view.from + span;
    draw();
  }

  /** Zoom by a factor, with a place of the axis where it is. */
  function zoom(factor, around) {
    const place = around ?? (begins(shown) + begins(shown + 1)) / 2;
    const here = place < view.from || place > view.to ? (view.from + view.to) / 2 : place;
    look(here - (here - view.from) * factor, here + (view.to - here) * factor);
  }

  /** Show an operation, and where that is asked for move the view to it. */
  function show(p, reveal) {
    shown = p;
    const [a, b] = [begins(p), begins(p + 1)];
    const span = view.to - view.from;
    if (reveal && (a < view.from || b > view.to)) look((a + b) / 2 - span / 2, (a + b) / 2 + span / 2);
    else drawCursor();
  }

  // Pointers: one drags or picks, two pinch.
  const pointers = new Map();
  let [dragged, pinched] = [false, 0];
  const place = (event) => event.clientX - chart.getBoundingClientRect().left;

  chart.addEventListener("pointerdown", (event) => {
    pointers.set(event.pointerId, place(event));
    chart.setPointerCapture(event.pointerId);
    dragged = false;
    pinched = 0;
  });
  chart.addEventListener("pointermove", (event) => {
    const x = place(event);
    const before = pointers.get(event.pointerId);
    if (before === undefined) {
      if (event.pointerType !== "touch") onPoint(operationAt(valueAt(x)));
      return;
    }
    if (pointers.size === 2) {
      const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
      const gap = Math.max(Math.abs(x - other), 10);
      if (pinched) zoom(pinched / gap, valueAt((x + other) / 2));
      pinched = gap;
      pointers.set(event.pointerId, x);
      dragged = true;
    } else if (dragged || Math.abs(x - before) > 4) {
      dragged = true;
      chart.classList.add("panning");
      const shift = ((before - x) / inner()) * (view.to - view.from);
      look(view.from + shift, view.to + shift);
      pointers.set(event.pointerId, x);
    }
  });
  const release = (event) => {
    if (pointers.delete(event.pointerId) && !dragged && event.type === "pointerup") {
      onPick(operationAt(valueAt(place(event))));
    }
    chart.classList.remove("panning");
  };
  chart.addEventListener("pointerup", release);
  chart.addEventListener("pointercancel", release);
  chart.addEventListener("pointerleave", () => onPoint(-1));
  chart.addEventListener("wheel", (event) => {
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      const shift = (event.deltaX / inner()) * (view.to - view.from);
      look(view.from + shift, view.to + shift);
    } else if (event.ctrlKey || document.activeElement === chart) {
      zoom(Math.exp(event.deltaY / 400), valueAt(place(event)));
    } else {
      return; // the page scrolls
    }
    event.preventDefault();
  }, { passive: false });
  new ResizeObserver(draw).observe(chart);

  return {
    draw,
    show,
    zoom,
    whole: () => look(0, end()),
    mark(stage) {
      marked = stage;
      drawCursor();
    },
    setAxis(bySeconds) {
      const [a, b] = [operationAt(view.from), operationAt(view.to)];
      view.bySeconds = bySeconds;
      look(begins(a), begins(b + 1) || end());
    },
    setPlan(newStep, newPlan, newNetwork) {
      [step, plan, network] = [newStep, newPlan, newNetwork];
      [view.from, view.to] = [0, end()];
      shown = plan.peakPosition;
      draw();
    },
  };
}
