"use strict";
// A button beside every command. Where a page may not use the clipboard, its text is selected and copied as by hand.
const COPY_TEXT = "Copy", COPIED_FOR = 2000;
async function copyText(element) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    return true;
  } catch {
    getSelection().selectAllChildren(element);
    return document.execCommand("copy");
  }
}
for (const block of document.querySelectorAll(".command")) {
  const command = block.querySelector("pre"), button = document.createElement("button");
  button.type = "button";
  button.textContent = COPY_TEXT;
  button.setAttribute("aria-label", `${COPY_TEXT}: ${command.textContent}`);
  button.addEventListener("click", async () => {
    const text = (await copyText(command)) ? "Copied" : "Selected";
    document.getElementById("said").textContent = button.textContent = text;
    setTimeout(() => { button.textContent = COPY_TEXT; }, COPIED_FOR);
  });
  block.append(button);
}
