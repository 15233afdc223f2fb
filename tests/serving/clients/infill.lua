-- Asks /infill in Neovim as llama.vim a1c8e6e does (autoload/llama.vim:596-920,1252): the same body to the same curl, the
-- same look at the raw answer, the same lines put into the buffer.
--
--   nvim --clean --headless -l infill.lua URL FILE LINE COLUMN

local url, file, row, column = arg[1], arg[2], tonumber(arg[3]), tonumber(arg[4])
local n_prefix, n_suffix, n_predict = 64, 16, 32 -- as in docs/editors.md

local function curl(body)
  local command = { 'curl', '--silent', '--no-buffer', '--request', 'POST', '--url', url .. '/infill',
    '--header', 'Content-Type: application/json', '--data', '@-', '--header', 'Authorization: Bearer ' }
  local done = vim.system(command, { stdin = vim.fn.json_encode(body), text = true }):wait(60000)
  assert(done.code == 0, 'curl: ' .. done.code .. ' ' .. done.stderr)
  return done.stdout
end

vim.cmd.edit(file)
local extra = { { text = 'import sys\n\nx = 1\n', time = { 1, 500000 }, filename = 'other.py' } }

-- What it sends for code of other places, whose answer it does not read.
curl({
  id_slot = 0, input_prefix = '', input_suffix = '', input_extra = extra, prompt = '', n_predict = 0, temperature = 0.0,
  samplers = {}, stream = false, cache_prompt = true, t_max_prompt_ms = 1, t_max_predict_ms = 1,
  response_fields = { '' }, model = '',
})

local line = vim.fn.getline(row)
local before, after = line:sub(1, column), line:sub(column + 1)
local indent = #line:match('^%s*')
if line:match('^%s*$') then
  before, after, indent = '', '', 0
end
local raw = curl({
  id_slot = 0,
  input_prefix = vim.fn.join(vim.fn.getline(math.max(1, row - n_prefix), row - 1), '\n') .. '\n',
  input_suffix = after .. '\n' .. vim.fn.join(vim.fn.getline(row + 1, row + n_suffix), '\n') .. '\n',
  input_extra = extra,
  prompt = before,
  n_predict = n_predict,
  stop = {},
  n_indent = indent,
  top_k = 40,
  top_p = 0.90,
  samplers = { 'top_k', 'top_p', 'infill' },
  stream = false,
  cache_prompt = true,
  t_max_prompt_ms = 500,
  t_max_predict_ms = 60000, -- it sends 250; a busy machine may need more
  response_fields = {
    'content', 'timings/prompt_n', 'timings/prompt_ms', 'timings/prompt_per_token_ms', 'timings/prompt_per_second',
    'timings/predicted_n', 'timings/predicted_ms', 'timings/predicted_per_token_ms', 'timings/predicted_per_second',
    'truncated', 'tokens_cached',
  },
  model = '',
})
-- It compares the bytes: one space after the colon, and there is no suggestion.
assert(vim.fn.match(raw, [[^\s*{]]) >= 0 and vim.fn.match(raw, [[\v"content"\s*:"]]) >= 0, 'no suggestion in ' .. raw)
local response = vim.fn.json_decode(raw)
for _, field in ipairs({ 'prompt_n', 'prompt_ms', 'prompt_per_second', 'predicted_n', 'predicted_ms' }) do
  assert(type(response['timings/' .. field]) == 'number', field .. ' is missing in ' .. raw)
end

local content = vim.split(response.content, '\n', { plain = true })
while #content > 0 and content[#content] == '' do
  table.remove(content)
end
assert(#content > 0, 'nothing was written: ' .. raw)
vim.fn.setline(row, line:sub(1, column) .. content[1])
if #content > 1 then
  vim.fn.append(row, vim.list_slice(content, 2))
end
vim.cmd.write()
