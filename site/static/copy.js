// A button on every block of code that copies it.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("div.cell_input div.highlight, div[class*=highlight-] div.highlight").forEach((block) => {
    if (block.closest(".cell_output") || block.querySelector(".kd-copy")) return;
    const button = document.createElement("button");
    button.className = "kd-copy";
    button.type = "button";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(block.querySelector("pre").textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    block.appendChild(button);
  });
});
