package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestDocuments: the documents name everything of which they promise a list,
// and their links lead somewhere.
func TestDocuments(t *testing.T) {
	text := make(map[string]string)
	for _, name := range []string{"README.md", "docs/api.md", "docs/relays.md", "docs/odroid.md", "docs/figures.md", "docs/design.md"} {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		text[name] = string(b)
	}
	lists := func(file, what string) {
		t.Helper()
		if !strings.Contains(text[file], "`"+what+"`") {
			t.Errorf("%s: got no `%s`", file, what)
		}
	}
	for _, v := range variables {
		lists("README.md", v.name)
	}
	for why := kept + 1; why < causes; why++ {
		lists("docs/api.md", causeNames[why])
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !strings.HasSuffix(f, "_test.go") {
			lists("docs/design.md", f)
		}
	}
	for name, s := range text {
		for _, link := range regexp.MustCompile(`\]\(([^)#:]*)(#[^)]*)?\)|<img src="([^"]*)"`).FindAllStringSubmatch(s, -1) {
			checkLink(t, text, name, link[1]+link[3], link[2])
		}
	}
}

// checkLink fails the test unless the file of a link exists, and has a heading
// that GitHub gives the anchor.
func checkLink(t *testing.T, text map[string]string, from, file, anchor string) {
	t.Helper()
	to := from
	if file != "" {
		to = filepath.Join(filepath.Dir(from), file)
	}
	if _, err := os.Stat(to); err != nil {
		t.Errorf("%s: %v", from, err)
	}
	if anchor == "" {
		return
	}
	for line := range strings.Lines(text[to]) {
		title, ok := strings.CutPrefix(strings.TrimLeft(line, "#"), " ")
		if ok && line[0] == '#' {
			title = regexp.MustCompile(`[^a-z0-9 -]`).ReplaceAllString(strings.ToLower(strings.TrimSpace(title)), "")
			if "#"+strings.ReplaceAll(title, " ", "-") == anchor {
				return
			}
		}
	}
	t.Errorf("%s: got no heading for %s%s", from, to, anchor)
}
