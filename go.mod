module vw

go 1.26.0

require (
	golang.org/x/net v0.62.0
	golang.org/x/sync v0.24.0
)
