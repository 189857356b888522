// ---- page: what is chosen, and who is told ------------------------------------------------------

const page = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const say = (text) => { find("live").textContent = text; };
const steps = new Map(); // plans that were unpacked, by number
const now = { page, network: null, step: null, plan: null, number: -1, picked: 0 };
let [timeline, table] = [null, null];

function figure(name, value, note) {
  const content = element("dd", {}, value);
  if (note) content.append(element("small", {}, note));
  return element("div", {}, element("dt", {}, name), content);
}

function writeFigures() {
  const { plan } = now;
  const again = plan.forwards - page.stages;
  find("figures").replaceChildren(
    figure("Projected peak", bytesText(plan.peakBytes), `${percentText(plan.peakBytes / Math.max(plan.budgetBytes, 1))} of the budget`),
    figure("Budget", bytesText(plan.budgetBytes, { budget: true }), `asked for as ${plan.budgetText}`),
    figure("Step", secondsText(plan.seconds), `store all: ${secondsText(page.storeAllSeconds)}`),
    figure("Overhead", signedPercent(plan.overhead), "for running stages again"),
    figure("Runs again", countText(again), `besides ${countText(page.stages)} first runs`),
    figure("From the best", percentText(plan.gap, 2), "at most, of its class"),
    figure("Store all", bytesText(page.storeAllBytes), `least budget ${bytesText(page.leastBudgetBytes)}`),
  );
}

function writeCertificate() {
  const { plan } = now;
  find("certificate").replaceChildren(...plan.certificate.map((line) => element("li", {}, line)));
  find("measured").replaceChildren(...(plan.measured ? [besideTable(plan)] : []));
}

function besideTable({ peakBytes, seconds, overhead, measured }) {
  const rows = [["peak", bytesText(peakBytes), bytesText(measured.peakBytes)]];
  if (measured.seconds) {
    const over = measured.plainSeconds ? measured.seconds / measured.plainSeconds - 1 : 0;
    rows.push(["step", secondsText(seconds), secondsText(measured.seconds)]);
    rows.push(["overhead", signedPercent(overhead), signedPercent(over)]);
  }
  rows.push(["largest difference of a gradient", "0", measured.gradientDifference]);
  rows.push(["as promised", "", measured.ok ? "yes" : "NO"]);
  const cells = (tag, row) => row.map((text, k) =>
    element(k ? tag : "th", k ? {} : { scope: tag === "td" ? "row" : "col" }, text));
  return element("table", { class: "beside" },
    element("caption", {}, "Projected and measured"),
    element("thead", {}, element("tr", {}, ...cells("th", ["", "projected", "measured"]))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cells("td", row)))));
}

function writeLegend() {
  const swatch = (ink, name) =>
    element("li", {}, element("span", { class: "swatch", style: `background: var(${ink})` }), name);
  const names = [...page.roles, "Transient, of the operation itself"];
  const found = STACK.filter((role) => now.step.used.includes(role)).reverse().map((role) => swatch(`--role-${role}`, names[role]));
  found.push(swatch("--once", "first run"));
  if (now.step.again.some((x) => x)) found.push(swatch("--again", "run again"));
  found.push(swatch("--back", "backward"));
  if (now.step.measured) found.push(swatch("--measured", "measured"));
  find("legend").replaceChildren(...found);
}

/** Show an operation: for a moment, or picked for good. */
function showOperation(p, { pick = false } = {}) {
  const { step, network } = now;
  if (pick) now.picked = p;
  find("details").replaceChildren(...detailsOf(now, p));
  find("details").dataset.operation = p;
  timeline.show(p, pick);
  const chart = find("chart");
  const words = operationWords(step, network, p);
  const again = step.again[p] ? ", run again" : "";
  chart.setAttribute("aria-valuemax", step.m);
  chart.setAttribute("aria-valuenow", p + 1);
  const measured = step.measured ? `, measured ${measuredText(step, p)}` : "";
  chart.setAttribute("aria-valuetext", `Operation ${p + 1}: ${words}${again}, ${bytesText(step.total[p])}${measured}`);
  if (pick) {
    const stage = step.code[p] === TURN ? 0 : step.stage[p];
    timeline.mark(stage);
    table.choose(stage);
  }
}

/** Show another plan: all of the page follows. */
async function choosePlan(number, { quiet = false } = {}) {
  if (number < 0 || number >= page.plans.length || number === now.number) return;
  now.number = number;
  find("budget").value = String(number);
  if (!steps.has(number)) {
    steps.set(number, readPlan(await unpack(page.plans[number].data), now.network));
    if (now.number !== number) return; // another was chosen meanwhile
  }
  [now.plan, now.step] = [page.plans[number], steps.get(number)];
  writeFigures();
  writeCertificate();
  writeLegend();
  timeline.setPlan(now.step, now.plan, now.network);
  table.setPlan(now.step);
  drawFront(find("front"), page, number, choosePlan);
  find("to-again").disabled = !now.step.again.some((x) => x);
  document.body.dataset.plan = number;
  showOperation(now.plan.peakPosition, { pick: true });
  if (!quiet) say(`Plan for ${now.plan.label}: peak ${bytesText(now.plan.peakBytes)}`);
}

function nextAgain() {
  const { step, picked } = now;
  for (let k = 1; k <= step.m; k++) {
    const p = (picked + k) % step.m;
    if (step.again[p]) return showOperation(p, { pick: true });
  }
}

function onChartKey(event) {
  const { step, plan, picked } = now;
  const to = (p) => showOperation(Math.max(0, Math.min(step.m - 1, p)), { pick: true });
  const far = Math.max(1, Math.round(step.m / 20));
  const keys = {
    ArrowRight: () => to(picked + 1), ArrowUp: () => to(picked + 1),
    ArrowLeft: () => to(picked - 1), ArrowDown: () => to(picked - 1),
    PageUp: () => to(picked + far), PageDown: () => to(picked - far),
    Home: () => to(0), End: () => to(step.m - 1),
    p: () => to(plan.peakPosition), r: nextAgain,
    "+": () => timeline.zoom(0.6), "=": () => timeline.zoom(0.6), "-": () => timeline.zoom(1 / 0.6),
    0: () => timeline.whole(),
  };
  const act = keys[event.key] || keys[event.key.toLowerCase()];
  if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  act();
}

function onFrontKey(event) {
  const last = page.plans.length - 1;
  const to = {
    ArrowRight: now.number + 1, ArrowUp: now.number + 1, ArrowLeft: now.number - 1,
    ArrowDown: now.number - 1, Home: 0, End: last,
  }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  choosePlan(Math.max(0, Math.min(last, to)));
}

/** Light and dark: the reader's system decides until the button is pressed. */
function setUpTheme() {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let asked = null;
  const apply = () => {
    document.documentElement.classList.toggle("dark", asked ?? system.matches);
    timeline.draw();
  };
  system.addEventListener("change", apply);
  find("theme").addEventListener("click", () => {
    asked = !document.documentElement.classList.contains("dark");
    apply();
    say(asked ? "dark" : "light");
  });
  apply();
}

function setUpControls() {
  const select = find("budget");
  page.plans.forEach((plan, k) => select.append(element("option", { value: k }, plan.label + (k === page.knee ? " · knee" : ""))));
  select.addEventListener("change", () => choosePlan(Number(select.value)));
  find("budget-label").hidden = page.plans.length < 2;
  find("front-section").hidden = page.plans.length < 2;
  find("grouping").hidden = now.network.blocks.length < 2;
  new ResizeObserver(() => now.plan && drawFront(find("front"), page, now.number, choosePlan)).observe(find("front"));
  find("front-legend").replaceChildren(...frontLegend(page));
  find("chart").addEventListener("keydown", onChartKey);
  find("front").addEventListener("keydown", onFrontKey);
  find("to-peak").addEventListener("click", () => showOperation(now.plan.peakPosition, { pick: true }));
  find("to-again").addEventListener("click", nextAgain);
  find("zoom-in").addEventListener("click", () => timeline.zoom(0.6));
  find("zoom-out").addEventListener("click", () => timeline.zoom(1 / 0.6));
  find("zoom-all").addEventListener("click", () => timeline.whole());
  for (const radio of document.querySelectorAll('input[name="axis"]')) {
    radio.addEventListener("change", () => timeline.setAxis(radio.value === "seconds"));
  }
  find("search").addEventListener("input", (event) => say(table.search(event.target.value)));
  find("by-block").addEventListener("change", (event) => table.group(event.target.checked));
}

async function begin() {
  const exact = page.exact ? "bytes to the byte" : "bytes by the planning model";
  find("title").textContent = page.title;
  find("subtitle").textContent = `${countText(page.stages)} stages · ${exact}${page.inputLayout ? ` · input ${page.inputLayout}` : ""}`;
  now.network = readNetwork(await unpack(page.network));
  timeline = makeTimeline(find("chart"), {
    onPoint: (p) => showOperation(p < 0 ? now.picked : p),
    onPick: (p) => showOperation(p, { pick: true }),
  });
  table = makeNetworkTable(find("network"), find("network-count"), now.network, (stage) =>
    showOperation(now.step.first[stage], { pick: true }));
  setUpControls();
  setUpTheme();
  await choosePlan(page.selected, { quiet: true });
  document.body.dataset.ready = "yes";
}

begin();
