// Announce to screen readers what happens, and put the cursor into the field for the question: at first, and whenever `focus`
// is another one, unless the user is somewhere else.
export default function ({ data, parentElement }) {
  document.documentElement.lang = data.language;
  const status = parentElement.querySelector("[role=status]");
  if (status.said === undefined) status.said = data.status;  // what was there before is no news
  if (status.said !== data.status) status.textContent = status.said = data.status;
  if (status.dataset.focus === data.focus || matchMedia("(pointer: coarse)").matches) return;  // no keyboard over a phone's page
  status.dataset.focus = data.focus;
  const end = performance.now() + 3000;
  const focus = () => {
    const active = document.activeElement;
    if (active && active !== document.body && !active.closest(".st-key-stop")) return;
    const field = document.querySelector("[data-testid=stChatInput] textarea");
    if (field && !field.disabled) field.focus();
    if (performance.now() < end) setTimeout(focus, 100);  // the field may not be there yet, or may be drawn again
  };
  focus();
}
