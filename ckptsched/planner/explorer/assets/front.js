// ---- front: bytes against seconds, a point a budget --------------------------------------------

const BOX = { width: 640, height: 340, left: 58, right: 24, top: 26, bottom: 46 }; // as wide as it may be
const HEADROOM = 1.6; // what is dearer than this many times the largest overhead goes to the edge
const STEEP = 3; // from this overhead on, and this ratio of bytes, a linear axis would hide most plans
const WIDE = 20;

/** Round numbers of a logarithmic axis, from a least to a largest value. */
function logTicks(least, largest) {
  const found = [];
  const factors = largest / least > 200 ? [1] : [1, 2, 5];
  for (let power = 10 ** Math.floor(Math.log10(least)); power <= largest; power *= 10) {
    found.push(...factors.map((k) => k * power));
  }
  return found.filter((value) => value >= least && value <= largest);
}

/** Draw the trade-off; `onPick` is told of the plan that was clicked. */
function drawFront(host, page, chosen, onPick) {
  BOX.width = Math.max(260, host.clientWidth || BOX.width);
  const base = page.storeAllSeconds || 1;
  const ratio = (seconds) => seconds / base - 1;
  const overheads = page.plans.map((plan) => ratio(plan.seconds));
  const top = HEADROOM * Math.max(...overheads, ...page.steps.map(([, s]) => ratio(s)), 0.02);
  const sizes = [...page.plans.map((plan) => plan.budgetBytes), page.storeAllBytes];
  const near = page.baselines.filter(
    ([name, size]) => name !== "store_all" && size <= 1.2 * Math.max(...sizes)); // it has its own mark
  const most = 1.06 * Math.max(...sizes, ...near.map(([, size]) => size), 1);
  const least = 0.9 * Math.min(...sizes.filter((size) => size > 0), most);
  const byFactor = most / least > WIDE;
  const along = (size) => byFactor ? Math.log(Math.max(size, least) / least) / Math.log(most / least) : size / most;
  const x = (size) => BOX.left + along(size) * (BOX.width - BOX.left - BOX.right);
  const steep = top > STEEP * HEADROOM;
  const up = (over) => steep ? Math.log1p(over) / Math.log1p(top) : over / top;
  const y = (over) => {
    const share = up(Math.min(Math.max(over, 0), top));
    return BOX.height - BOX.bottom - share * (BOX.height - BOX.top - BOX.bottom);
  };
  const svg = shape("svg", { viewBox: `0 0 ${BOX.width} ${BOX.height}`, "aria-hidden": "true" });
  const [unit, scale] = unitFor(most);
  const marksX = byFactor ? logTicks(least / scale, most / scale) : ticks(most / scale, BOX.width / 110);
  const marksY = steep ? [0, ...logTicks(0.5, top)] : ticks(top, 4);
  drawFrontAxes(svg, [x, y], [marksX.map((value) => value * scale), marksY], [unit, scale]);
  const stairs = (points) => points.map(([size, over], k) =>
    k ? `H${x(size)}V${y(over)}` : `M${x(size)},${y(over)}`).join("");
  if (page.steps.length) {
    const path = stairs(page.steps.map(([size, seconds]) => [size, ratio(seconds)]));
    svg.append(shape("path", { class: "known", d: path }));
  } else {
    svg.append(shape("path", { class: "step", d: stairs(page.plans.map((p, k) => [p.budgetBytes, overheads[k]])) }));
  }
  const taken = page.plans.map((plan, k) => {
    const [cx, cy] = [x(plan.budgetBytes), y(overheads[k])];
    return [cx - 8, cy - 8, cx + 8, cy + 8];
  });
  for (const [name, size, seconds] of near) drawBaseline(svg, name, x(size), y(ratio(seconds)), ratio(seconds), top, taken);
  const [wholeX, wholeY] = [x(page.storeAllBytes), y(0)];
  svg.append(shape("path", { class: "whole", d: `M${wholeX},${wholeY - 10}l10,10l-10,10l-10,-10z` }));
  page.plans.forEach((plan, k) => {
    const at = { cx: x(plan.budgetBytes), cy: y(overheads[k]) };
    if (k === page.knee) svg.append(shape("circle", { ...at, r: 11, class: "knee" }));
    if (plan.measured?.seconds) {
      const over = plan.measured.seconds / plan.measured.plainSeconds - 1;
      const [mx, my] = [x(plan.measured.peakBytes), y(over)];
      svg.append(shape("path", { class: "measured", d: `M${mx - 4},${my - 4}l8,8m0,-8l-8,8` }));
    }
    const point = shape("circle", { ...at, r: k === chosen ? 7 : 4.5, class: `point${k === chosen ? " chosen" : ""}` });
    const halo = shape("circle", { ...at, r: 13, class: "halo", "data-plan": k });
    halo.append(shape("title", {}, plan.label));
    halo.addEventListener("click", () => onPick(k));
    svg.append(point, halo);
  });
  host.replaceChildren(svg);
  host.setAttribute("aria-valuemax", page.plans.length);
  host.setAttribute("aria-valuenow", chosen + 1);
  host.setAttribute("aria-valuetext", page.plans[chosen].label);
}

function drawFrontAxes(svg, [x, y], [marksX, marksY], [unit, scale]) {
  for (const value of marksX) {
    const text = tickText(value / scale);
    svg.append(shape("text", { x: x(value), y: BOX.height - BOX.bottom + 18, "text-anchor": "middle" }, text));
  }
  for (const value of marksY) {
    const at = y(value);
    svg.append(shape("line", { class: "grid", x1: BOX.left, x2: BOX.width - BOX.right, y1: at, y2: at }));
    svg.append(shape("text", { x: BOX.left - 8, y: at + 4, "text-anchor": "end" }, `${value ? "+" : ""}${tickText(100 * value)} %`));
  }
  const middle = (BOX.left + BOX.width - BOX.right) / 2;
  svg.append(shape("text", { x: middle, y: BOX.height - 8, "text-anchor": "middle" }, `budget in ${unit}`));
  svg.append(shape("text", { x: BOX.left - 50, y: 12 }, "time beyond storing everything"));
}

/** A label beside a mark, where it hides no other and stays in the frame. */
function drawLabel(svg, text, x, y, taken) {
  const wide = 6.6 * text.length;
  for (const [dx, dy] of [[8, 4], [8, -8], [8, 16], [-8 - wide, 4], [-8 - wide, -8], [-wide / 2, -12]]) {
    const box = [x + dx, y + dy - 11, x + dx + wide, y + dy + 3];
    const inside = box[0] >= BOX.left && box[2] <= BOX.width - 2 && box[1] >= 14 && box[3] <= BOX.height - BOX.bottom + 2;
    const free = taken.every((b) => box[2] < b[0] || box[0] > b[2] || box[3] < b[1] || box[1] > b[3]);
    if (inside && free) {
      taken.push(box);
      svg.append(shape("text", { x: x + dx, y: y + dy }, text));
      return;
    }
  }
}

function drawBaseline(svg, name, x, y, over, top, taken) {
  const mark = over > top
    ? shape("path", { class: "baseline", d: `M${x},${y - 6}l5,9h-10z` })
    : shape("rect", { class: "baseline", x: x - 3.5, y: y - 3.5, width: 7, height: 7 });
  mark.append(shape("title", {}, `${name}: ${signedPercent(over)} time`));
  svg.append(mark);
  taken.push([x - 6, y - 6, x + 6, y + 6]);
  drawLabel(svg, over > top ? `${name} (${signedPercent(over, 0)})` : name, x, y, taken);
}

/** What the marks of the front mean; those alone that it has. */
function frontLegend(page) {
  const mark = (name, draw) => {
    const svg = shape("svg", { width: 16, height: 16, viewBox: "0 0 16 16", "aria-hidden": "true" });
    svg.append(draw);
    return element("li", {}, svg, name);
  };
  const found = [mark("plans", shape("circle", { cx: 8, cy: 8, r: 4.5, class: "point" }))];
  if (page.steps.length) found.push(mark("every step that is known", shape("path", { class: "known", d: "M1,4H8V11H15" })));
  if (page.knee !== null) found.push(mark("knee", shape("circle", { cx: 8, cy: 8, r: 6, class: "knee" })));
  found.push(mark("storing everything", shape("path", { class: "whole", d: "M8,1l7,7l-7,7l-7,-7z" })));
  if (page.baselines.length) found.push(mark("rules of thumb", shape("rect", { class: "baseline", x: 4, y: 4, width: 8, height: 8 })));
  if (page.plans.some((plan) => plan.measured?.seconds)) {
    found.push(mark("measured", shape("path", { class: "measured", d: "M4,4l8,8m0,-8l-8,8" })));
  }
  return found;
}
