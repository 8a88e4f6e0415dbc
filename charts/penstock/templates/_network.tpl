{{/* Pods of this release, also as seen from another namespace. Takes (list ROOT COMPONENT). */}}
{{- define "penstock.peer" -}}
- namespaceSelector:
    matchLabels:
      kubernetes.io/metadata.name: {{ (index . 0).Release.Namespace }}
  podSelector:
    matchLabels:
      {{- include "penstock.selector" . | nindent 6 }}
{{- end -}}

{{/* Who may reach an engine. */}}
{{- define "penstock.engineCallers" -}}
{{ include "penstock.peer" (list . "gateway") }}
{{ include "penstock.peer" (list . "controller") }}
{{- with .Values.networkPolicy.prometheus }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The chart's own callers of the gateway: `helm test` and the load test. */}}
{{- define "penstock.clients" -}}
{{ include "penstock.peer" (list . "test") }}
{{ include "penstock.peer" (list . "loadtest") }}
{{- end -}}

{{- define "penstock.egress.dns" -}}
- ports:
    {{- range .Values.networkPolicy.egress.dnsPorts }}
    - {port: {{ . }}, protocol: UDP}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
{{- end -}}

{{/* Where gateway and controller go: names, Redis, engines. Takes {root, ports}. */}}
{{- define "penstock.egress" -}}
{{- $root := .root -}}
{{- $egress := $root.Values.networkPolicy.egress -}}
{{ include "penstock.egress.dns" $root }}
{{- if $root.Values.redis.bundled.enabled }}
- ports:
    - {port: 6379, protocol: TCP}
  to:
    - podSelector:
        matchLabels:
          {{- include "penstock.selector" (list $root "redis") | nindent 10 }}
{{- else }}
- ports:
    {{- range $root.Values.redis.external.ports }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
{{- end }}
{{- if $root.Values.engines }}
- ports:
    - {port: 8000, protocol: TCP}
  to:
    - podSelector:
        matchLabels:
          app.kubernetes.io/instance: {{ $root.Release.Name }}
          penstock.io/role: engine
{{- end }}
{{- with .ports }}
# Engines that the chart did not deploy: by their ports, since where they are is not known here.
- ports:
    {{- range . }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
{{- end }}
{{- with $egress.extra }}
{{ toYaml . }}
{{- end }}
{{- end -}}
