// The slider of a text that is denoised: each token is masked before its step, and marked at it.
for (const figure of document.querySelectorAll(".denoising")) {
  const tokens = [...figure.querySelectorAll("span")];
  const controls = figure.querySelector(".controls");
  const slider = controls.querySelector("input");
  const button = controls.querySelector("button");
  const last = Number(slider.max);
  let timer = null;

  function show(step) {
    slider.value = step;
    let known = 0;
    for (const token of tokens) {
      const at = Number(token.dataset.step);
      token.classList.toggle("masked", at > step);
      token.classList.toggle("fresh", at === step && step > 0);
      known += at <= step;
    }
    controls.querySelector("output").textContent = `step ${step} of ${last}: ${known} of ${tokens.length} tokens`;
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    button.textContent = "Play";
  }

  function play() {
    if (timer !== null) return stop();
    let step = Number(slider.value) >= last ? 0 : Number(slider.value);
    show(step);
    button.textContent = "Stop";
    timer = setInterval(() => {
      show(++step);
      if (step >= last) stop();
    }, 250);
  }

  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  button.addEventListener("click", play);
  controls.hidden = false;
  show(last);
}
