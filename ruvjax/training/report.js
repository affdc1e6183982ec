"use strict";
(() => {
  // viridis at 17 even stops; colours in between are interpolated
  const STOPS = ["440154", "48186a", "472d7b", "424086", "3b528b", "33638d", "2c728e", "26828e", "21918c",
    "1fa088", "28ae80", "3fbc73", "5ec962", "84d44b", "addc30", "d8e219", "fde725"]
    .map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  const REMASK = 2;

  function viridis(share) {
    const place = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1);
    const low = Math.min(Math.floor(place), STOPS.length - 2), part = place - low;
    return STOPS[low].map((value, i) => Math.round(value + part * (STOPS[low + 1][i] - value)));
  }
  const css = (rgb) => `rgb(${rgb.join(",")})`;
  const inkOn = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 128 ? "#101010" : "#ffffff");
  const hexOf = (name) => {
    const value = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    return [1, 3, 5].map((at) => parseInt(value.slice(at, at + 2), 16));
  };
  const visible = (piece) => piece
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u202a-\u202e\u2066-\u2069\ufeff]/g, "\ufffd")
    .replace(/\n/g, "\u21b5\n");

  function press(group, chosen) {
    for (const button of group.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button === chosen));
  }

  /* frames[s] is the row after s steps: per position its token, the step that revealed it (0: masked or given), confidence */
  function framesOf(trace) {
    let now = trace.initial.map((token) => ({ token, step: 0, confidence: 0, given: token !== trace.mask, changed: -1 }));
    const frames = [now];
    let next = 0;
    for (let step = 0; step < trace.steps; step++) {
      now = now.slice();
      for (; next < trace.events.length && trace.events[next][0] === step; next++) {
        const [, position, kind, token, confidence] = trace.events[next];
        now[position] = kind === REMASK
          ? { token: trace.mask, step: 0, confidence: 0, given: false, changed: step + 1 }
          : { token, step: step + 1, confidence, given: false, changed: step + 1 };
      }
      frames.push(now);
    }
    return frames;
  }

  function show(element, trace) {
    trace.events.sort((a, b) => a[0] - b[0]);
    const frames = framesOf(trace), last = frames[frames.length - 1], length = trace.initial.length;
    const masked = (cell) => cell.token === trace.mask;
    const textOf = (cell) => visible(trace.pieces[cell.token] || "");
    const shade = (cell, by) => viridis(by === "step" ? (cell.step - 1) / Math.max(trace.steps - 1, 1) : cell.confidence);
    const find = (selector) => element.querySelector(selector);
    const seek = find(".seek"), play = find(".play"), at = find(".at"), tokens = find(".tokens"), hover = find(".hover");
    const maps = [...element.querySelectorAll(".map")], resting = hover.textContent;
    let by = "step", timer = 0;

    const spans = last.map(() => tokens.appendChild(document.createElement("span")));

    function drawMaps() {
      const hole = hexOf("--hole"), given = hexOf("--given"), ink = css(hexOf("--ink"));
      for (const canvas of maps) {
        canvas.width = length;
        canvas.height = Math.max(trace.steps, 1);
        canvas.style.height = `${Math.min(Math.max(trace.steps * 6, 96), 260)}px`;
        canvas.style.imageRendering = "pixelated";
        const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
        for (let step = 0; step < canvas.height; step++) {
          const frame = frames[Math.min(step + 1, frames.length - 1)];
          for (let position = 0; position < length; position++) {
            const cell = frame[position];
            const colour = masked(cell) ? hole : cell.given ? given : shade(cell, canvas.dataset.by);
            image.data.set([...colour, 255], 4 * (step * length + position));
          }
        }
        context.putImageData(image, 0, 0);
        const line = canvas.nextElementSibling || canvas.parentElement.appendChild(document.createElement("div"));
        line.className = "cursor";
        line.style.cssText = `position:absolute;left:0;right:0;height:0;border-top:1.5px dashed ${ink};pointer-events:none`;
      }
    }

    function draw() {
      const step = Number(seek.value), frame = frames[step];
      let revealed = 0, open = 0;
      frame.forEach((cell, position) => {
        const span = spans[position];
        if (masked(cell)) {
          open++;
          span.className = "masked";
          span.style.cssText = "";
          span.textContent = textOf(last[position]) || "?"; // keeps the place of what will stand here
        } else {
          revealed += cell.given ? 0 : 1;
          const colour = cell.given ? null : shade(cell, by);
          span.className = (cell.given ? "given" : "") + (cell.changed === step && step > 0 && step < trace.steps ? " now" : "");
          span.style.cssText = colour ? `background:${css(colour)};color:${inkOn(colour)}` : "";
          span.textContent = textOf(cell);
        }
        span.title = masked(cell) ? `position ${position + 1}: masked`
          : cell.given ? `position ${position + 1}: given`
          : `position ${position + 1}: step ${cell.step}, confidence ${cell.confidence.toFixed(3)}`;
      });
      at.textContent = `step ${step} of ${trace.steps}, ${revealed} of ${revealed + open} revealed`;
      for (const canvas of maps) {
        const line = canvas.nextElementSibling;
        line.style.top = `${canvas.offsetTop + canvas.offsetHeight * step / Math.max(trace.steps, 1)}px`;
        line.hidden = step === 0 || step === trace.steps;
      }
    }

    function stop() {
      clearInterval(timer);
      timer = 0;
      play.textContent = "\u25b6";
    }
    play.addEventListener("click", () => {
      if (timer) return stop();
      if (Number(seek.value) >= trace.steps) seek.value = "0";
      play.textContent = "\u275a\u275a";
      draw();
      timer = setInterval(() => {
        seek.value = String(Number(seek.value) + 1);
        draw();
        if (Number(seek.value) >= trace.steps) stop();
      }, Math.min(Math.max(6000 / Math.max(trace.steps, 1), 40), 400));
    });
    seek.addEventListener("input", () => { stop(); draw(); });
    const colour = find(".colour");
    for (const button of colour.querySelectorAll("button")) {
      button.addEventListener("click", () => { by = button.dataset.by; press(colour, button); draw(); });
    }
    press(colour, colour.querySelector("button"));
    for (const canvas of maps) {
      canvas.parentElement.style.position = "relative";
      const place = (event) => {
        const box = canvas.getBoundingClientRect();
        const within = (share, size) => Math.min(Math.max(Math.floor(share * size), 0), size - 1);
        return [within((event.clientX - box.left) / box.width, length),
          within((event.clientY - box.top) / box.height, Math.max(trace.steps, 1)) + 1];
      };
      canvas.addEventListener("mousemove", (event) => {
        const [position, step] = place(event), cell = frames[Math.min(step, frames.length - 1)][position];
        hover.textContent = `Position ${position + 1} after step ${step}: ` + (masked(cell) ? "masked"
          : `${JSON.stringify(trace.pieces[cell.token] || "")}, `
            + (cell.given ? "given" : `revealed at step ${cell.step} with confidence ${cell.confidence.toFixed(3)}`));
      });
      canvas.addEventListener("mouseleave", () => { hover.textContent = resting; });
      canvas.addEventListener("click", (event) => { stop(); seek.value = String(place(event)[1]); draw(); });
    }
    drawMaps();
    draw();
    addEventListener("resize", draw);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawMaps(); draw(); });
  }

  const traces = JSON.parse(document.getElementById("traces").textContent);
  for (const element of document.querySelectorAll(".trace")) show(element, traces[Number(element.dataset.trace)]);
  for (const ramp of document.querySelectorAll(".ramp")) {
    const context = ramp.getContext("2d");
    for (let x = 0; x < ramp.width; x++) {
      context.fillStyle = css(viridis(x / (ramp.width - 1)));
      context.fillRect(x, 0, 1, 1);
    }
  }
  for (const group of document.querySelectorAll("[data-switch]")) {
    const figure = group.closest("figure");
    group.hidden = false;
    press(group, group.querySelector("button"));
    for (const button of group.querySelectorAll("button")) {
      button.addEventListener("click", () => {
        press(group, button);
        for (const view of figure.querySelectorAll("[data-view]")) view.hidden = view.dataset.view !== button.dataset.show;
      });
    }
  }
})();
